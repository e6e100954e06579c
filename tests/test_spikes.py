"""A loss that jumps: back to a checkpoint, and on behind the samples since, on every replay."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from tests.test_loop import RUN, final_state
from tests.test_moved_data import PLAIN
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run
from trainer.data.stream import Stream
from trainer.errors import CheckpointError, ConfigError, TrainerError
from trainer.recipes import clip
from trainer.running.spikes import LeftOut, highest, read_left_out
from trainer.types import Batch, Features, Losses

WATCHED = "spikes={window: 4, settle: 1, deviations: 8}"


def config_of(folder: Path, *overrides: str) -> RunConfig:
    spec = f"{folder.parent}/shards/emoji-{{000000..000001}}.tar"
    return parse_run(RUN.format(folder=folder, spec=spec, norm="batch"), [*PLAIN, *overrides])


@contextmanager
def poisoned(first: int, last: int, factor: float) -> Iterator[None]:
    """Samples at these places of the first epoch have another loss; each rank sees its own."""
    taken: dict[int, int] = {}
    take_one, losses = Stream.take_one, clip.Recipe.losses

    def take(self: Stream) -> Batch:
        batch = take_one(self)
        start = self.share.global_batch * ((self._next - 1) // self.num_micro_batches)
        taken.update(dict.fromkeys(batch.sample_id.tolist(), start + self._plan.base))
        return batch

    def changed(self: clip.Recipe, features: Features, batch: Batch, step: int) -> Losses:
        found = losses(self, features, batch, step)
        place = taken.get(int(batch.sample_id[0]), -1)
        return found if not first <= place < last else Losses.of(contrastive=found.total * factor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stream, "take_one", take)
        patched.setattr(clip.Recipe, "losses", changed)
        yield


def courses(comm: Comm, folder: Path) -> list[str]:
    from trainer.loop import train

    said = []
    for name, factor, *more in (
        ("spike", 50.0, "spikes={window: 4, settle: 1, deviations: 8}"),
        ("nan", math.nan, WATCHED, "max_skipped_steps=0"),
        ("often", 50.0, "spikes={window: 4, settle: 1, deviations: 8, most: 1}"),
        ("nowhere", 1.0, WATCHED),
        ("never seen", 1.0, WATCHED),
    ):
        last = 10_000 if name == "often" else 72
        config = config_of(folder / name, *more)
        if name == "never seen" and comm.is_main:
            config.workdir.mkdir(parents=True)
            text = (folder / "spike/run/left_out.json").read_text()
            (config.workdir / "left_out.json").write_text(text)
        comm.barrier()
        with poisoned(60, last, factor):
            try:
                progress = train(config).progress
                said.append(f"step {progress.step} after {progress.samples}")
            except TrainerError as error:
                said.append(str(error))
    return said


@pytest.mark.heavy
def test_a_planted_spike_and_a_loss_that_is_none_are_left_behind(tmp_path: Path) -> None:
    """Steps 0 to 4 are good, the sixth global batch of 12 is not; saved every two steps."""
    write_shards(tmp_path / "shards", count=40, per_shard=20)
    first, second = run_ranks(courses, 2, tmp_path, timeout_seconds=400)
    assert first == second
    spike, nan, often, nowhere, never = first
    assert spike == nan == never == "step 8 after 120"
    assert nowhere == "step 8 after 96"
    assert "the run has gone back 1 times, which are spikes.most" in often
    ((step, until, why),) = json.loads((tmp_path / "spike/run/left_out.json").read_text())
    assert (step, until) == (4, 72)
    assert "at step 6, over" in why
    seen, unseen = (final_state(config_of(tmp_path / name)) for name in ("spike", "never seen"))
    assert [name for name in seen if not torch.equal(seen[name], unseen[name])] == []
    events = (tmp_path / "spike/run/events.jsonl").read_text().splitlines()
    back = [record for record in map(json.loads, events) if record["event"] == "went back"]
    assert [(record["step"], record["until_sample"]) for record in back] == [(4, 72)]
    lines = (tmp_path / "spike/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def test_what_is_a_spike() -> None:
    assert highest([1.0, 2.0, 3.0, 4.0, 100.0], 6.0) == 3.0 + 6 * 1.4826 * 1.0
    assert highest([5.0] * 9, 6.0) == 5.0 + 6 * 0.05


def test_a_file_of_what_is_left_out_that_can_not_be_read_is_one_sentence(tmp_path: Path) -> None:
    assert read_left_out(tmp_path, Comm.solo()) == []
    (tmp_path / "left_out.json").write_text('[[4, 72, "why"]]')
    assert read_left_out(tmp_path, Comm.solo()) == [LeftOut(4, 72, "why")]
    for text in ("", "[[4]]", '{"a": 1}', "[" * 100_000):
        (tmp_path / "left_out.json").write_text(text)
        with pytest.raises(CheckpointError, match="bring it back, or choose another workdir"):
            read_left_out(tmp_path, Comm.solo())


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["spikes={window: 8}"], "spikes.window is 8, and the run has 8 steps"),
        (["spikes={window: 4}", "data.reader=webdataset", "data.epoch_samples=40"], "reader"),
    ],
)
def test_spikes_that_nobody_could_leave_behind_are_refused(
    tmp_path: Path, keys: list[str], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        config_of(tmp_path, *keys)


def test_an_episode_can_not_lose_samples(tmp_path: Path) -> None:
    text = RUN.format(folder=tmp_path, spec="a.tar", norm="batch")
    with pytest.raises(ConfigError, match="an episode of protoclip is clustered"):
        parse_run(text, ["spikes={window: 4}"])
