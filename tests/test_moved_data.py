"""A run goes on where its shards lie now, and not on others."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from tests.test_loop import RUN, final_state
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run
from trainer.data.index import write_index
from trainer.errors import TrainerError

PLAIN = (
    "recipe={name: clip, model: {image_size: 32, patch_size: 16, text_length: 8, vocabulary: 300, "
    "embed_dim: 16, image: {width: 32, layers: 1, heads: 2}, "
    "text: {width: 32, layers: 1, heads: 2}}}",
    "evals=[]",
    "deepspeed=ds_configs/zero1.json",
)


def shards_in(folder: Path) -> Path:
    """Numbered 8 to 11: a glob lists them in another order than a range of braces."""
    write_shards(folder, count=40, per_shard=10)
    for number in range(4):
        old, new = folder / f"emoji-{number:06d}.tar", folder / f"{number + 8}.tar"
        old.rename(new)
        (folder / f"emoji-{number:06d}.tar.index").unlink()
        write_index(str(new))
    return folder


def config_of(folder: Path, spec: str, *overrides: str) -> RunConfig:
    return parse_run(RUN.format(folder=folder, spec=spec, norm="batch"), [*PLAIN, *overrides])


def starts(comm: Comm, configs: list[RunConfig]) -> list[str]:
    """What becomes of one start after the other."""
    from trainer.loop import train

    said = []
    for config in configs:
        try:
            said.append(f"step {train(config).progress.step}")
        except TrainerError as error:
            said.append(str(error))
    return said


def test_a_run_goes_on_with_its_shards_elsewhere_or_as_a_glob_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    here = shards_in(tmp_path / "here")
    shutil.copytree(here, tmp_path / "there")
    shutil.copytree(here, tmp_path / "changed")
    shutil.copy(here / "8.tar", tmp_path / "changed/9.tar")
    write_index(str(tmp_path / "changed/9.tar"))
    braces = f"{here}/{{8..11}}.tar"
    configs = [
        *[config_of(tmp_path / "whole", braces, f"steps={steps}") for steps in (2, 5, 8)],
        config_of(tmp_path / "moved", braces, "steps=2"),
        config_of(tmp_path / "moved", f"{tmp_path}/there/{{8..11}}.tar", "steps=5"),
        config_of(tmp_path / "moved", f"{here}/1*.tar::{here}/[89].tar", "steps=8"),
        config_of(tmp_path / "moved", f"{tmp_path}/changed/*.tar", "steps=10"),
        config_of(tmp_path / "moved", f"{here}/{{8..10}}.tar", "steps=10"),
        config_of(tmp_path / "moved", f"a={braces}", "steps=10"),
        config_of(tmp_path / "moved", braces, "steps=10", "data.window_shards=3"),
    ]
    (said,) = run_ranks(starts, 1, configs, timeout_seconds=300)
    assert said[:6] == ["step 2", "step 5", "step 8"] * 2
    for text, why in zip(
        said[6:],
        ("1 changed, as 9", "1 are missing, as 11", "4 are new, as a=10", "window_shards: 8 -> 3"),
        strict=True,
    ):
        assert why in text
    whole, moved = final_state(configs[2]), final_state(configs[5])
    assert whole.keys() == moved.keys()
    assert [name for name in whole if not torch.equal(whole[name], moved[name])] == []
    restored = Checkpointer(tmp_path / "moved/run/checkpoints", Comm.solo()).latest()
    assert restored is not None
    assert [line.split()[0] for line in restored.texts["shards.txt"].splitlines()] == [
        "8",
        "9",
        "10",
        "11",
    ]
