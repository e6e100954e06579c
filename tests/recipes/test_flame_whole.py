"""FLAME from a language model's folder to zero-shot figures and a folder that can be passed on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoModel, CLIPVisionModel

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from tests.teachers.small_teachers import DIM, save_llama
from tools import embed as embed_tool
from tools import export as export_tool
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run
from trainer.data.decode import decode_image
from trainer.data.fields import find_image
from trainer.data.shards import ShardSet
from trainer.data.texts import TextSet, text_id
from trainer.data.views import normalize as normalize_pixels
from trainer.errors import ConfigError, DataError
from trainer.evals.zero_shot import stored_prompts
from trainer.export.native import load_exported_patch_tower
from trainer.programs.workdir import evaluate_workdir, logged_results, open_workdir
from trainer.run import refuse_text_evals
from trainer.store import EmbeddingStore
from trainer.teachers.spec import TeacherSpec, load_teacher
from trainer.types import Batch

RUN = """
workdir: {folder}/run
steps: 100
global_batch: 8
deepspeed: ds_configs/zero0.json
recipe:
  name: flame
  store: {folder}/store
  head_hidden: 24
  model:
    {{image_size: 32, patch_size: 16, embed_dim: 32, image: {{width: 32, layers: 1, heads: 2}}}}
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.003}}
evals:
  - name: zero_shot
    label: classes
    data: "{spec}"
    target: concept
    templates: ["{{}}", "a picture of {{}}"]
    text_store: {folder}/classes
    text_vectors: [0, 4]
log_every: 50 steps
"""


def call(tool, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tool.py", *map(str, arguments)])
    monkeypatch.setattr(tool.Comm, "from_environment", tool.Comm.solo, raising=False)
    tool.main()


def train_once(comm: Comm, config: RunConfig) -> int:
    from trainer.loop import train

    return train(config).progress.step


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def naive_tops(folder: Path, spec: str) -> tuple[float, float]:
    """Every image against live vectors of the language model, in float64."""
    settings = {"prompts": "flame", "pooling": "last"}
    teacher = load_teacher(TeacherSpec(model=str(folder / "llm"), **settings))
    model = open_workdir(folder / "run", Comm.solo()).model.double()
    shards = ShardSet.open(spec)
    raws = [shards.read(index) for index in range(len(shards))]
    answers = [class_name(raw.fields) for raw in raws]
    names = sorted(set(answers))
    classes = []
    for name in names:
        prompts = [(text,) * 3 for text in (name, f"a picture of {name}")]
        vectors = teacher.encode(prompts).double()[:, [0, 4]].mean(1)
        classes.append(normalize(normalize(vectors, dim=-1).mean(0), dim=-1))
    places = []
    for raw, answer in zip(raws, answers, strict=True):
        scores = torch.stack(classes) @ embedded(model, find_image(raw.fields))
        places.append(scores.argsort(descending=True).tolist().index(names.index(answer)))
    top1, top5 = (100 * sum(place < k for place in places) / len(places) for k in (1, 5))
    return top1, top5


def class_name(fields: dict[str, bytes]) -> str:
    name: str = json.loads(fields["json"])["concept"]
    return name


@torch.no_grad()
def embedded(model, data: bytes) -> torch.Tensor:
    pixels = decode_image(data, size=32, background=(255, 255, 255), max_pixels=10**6)
    dtype = next(model.parameters()).dtype
    images = normalize_pixels(pixels[None]).to(dtype)
    return normalize(model.image.images(images), dim=-1)[0]


def test_from_a_language_model_to_zero_shot_and_an_exported_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm, spec = save_llama(tmp_path / "llm"), write_shards(tmp_path / "s", count=30, per_shard=12)
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path, spec=spec))
    teacher = ("--teacher", llm, "prompts=flame", "pooling=last")
    call(embed_tool, monkeypatch, *teacher, "--data", spec, "--out", tmp_path / "store")
    names = ("--class-names", tmp_path / "run.yaml", "--out", tmp_path / "classes")
    call(embed_tool, monkeypatch, *teacher, *names)
    call(embed_tool, monkeypatch, *teacher, *names, "--verify")
    assert "computed again agree" in capsys.readouterr().out
    before = bytes_in(tmp_path / "store"), bytes_in(tmp_path / "classes"), bytes_in(llm)
    config = parse_run((tmp_path / "run.yaml").read_text())
    refuse_text_evals(config)
    assert run_ranks(train_once, 1, config, timeout_seconds=300) == [100]
    assert (bytes_in(tmp_path / "store"), bytes_in(tmp_path / "classes"), bytes_in(llm)) == before
    logged = logged_results(tmp_path / "run")["classes"]
    assert logged == pytest.approx(evaluate_workdir(tmp_path / "run", Comm.solo())["classes"])
    assert (logged["top1"], logged["top5"]) == pytest.approx(naive_tops(tmp_path, spec))
    assert logged["top5"] > 0

    call(export_tool, monkeypatch, tmp_path / "run")
    out = tmp_path / "run" / "export"
    model = open_workdir(tmp_path / "run", Comm.solo()).model
    batch = Batch(torch.randn(3, 3, 32, 32), None, None, torch.arange(3))
    with torch.no_grad():
        for found, expected in zip(
            load_exported_patch_tower(out)(batch), model(batch), strict=True
        ):
            assert (found is None and expected is None) or torch.equal(found, expected)
        states = CLIPVisionModel.from_pretrained(out / "image")(batch.images).last_hidden_state
        assert torch.equal(states, model.image.backbone(batch.images).last_hidden_state)
    assert AutoModel.from_pretrained(out / "image").config.hidden_size == 32
    card = (out / "README.md").read_text()
    assert load_teacher(TeacherSpec(model=str(llm))).identity.model[:12] in card
    picture = np.random.default_rng(4).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).save(out / "picture.png")
    code = card.split("```python\n")[1].split("```")[0]
    result = subprocess.run(
        [sys.executable, "-c", "import torch\ntorch.set_printoptions(8)\n" + code],
        cwd=out,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    printed = torch.tensor(
        [float(x) for x in result.stdout.split("[[")[1].split("]]")[0].split(",")]
    )
    ours = embedded(model, (out / "picture.png").read_bytes())
    torch.testing.assert_close(printed, ours, atol=1e-5, rtol=0)


@pytest.mark.heavy
def test_mistakes_with_class_names_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, spec = save_llama(tmp_path / "llm"), write_shards(tmp_path / "s", count=12, per_shard=12)
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path, spec=spec))
    teacher = ("--teacher", llm, "prompts=flame", "pooling=last")
    names = ("--class-names", tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="stands alone"):
        call(embed_tool, monkeypatch, *teacher, *names, "--data", spec, "--out", tmp_path / "x")
    call(embed_tool, monkeypatch, *teacher, "--data", spec, "--out", tmp_path / "store")
    call(embed_tool, monkeypatch, *teacher, *names, "layer=2", "--out", tmp_path / "classes")
    config = parse_run((tmp_path / "run.yaml").read_text())
    with pytest.raises(ConfigError, match=r"evaluation classes: .* but their layer differs"):
        refuse_text_evals(config)
    with pytest.raises(DataError, match="lacks 1 of 1 prompts of evaluation classes, as 'a cow'"):
        stored_prompts(["a cow"], config.evals[0], dim=DIM)
    with pytest.raises(ConfigError, match="vectors of 32 numbers, the model gives 7"):
        stored_prompts(["a cow"], config.evals[0], dim=7)
    assert EmbeddingStore.open(tmp_path / "classes").ids.min() >= 0


def test_texts_have_ids_of_their_own_and_come_once() -> None:
    texts = TextSet(["a", "b", "a", "c"], per_shard=2)
    assert (texts.sizes, len(texts)) == ((2, 1), 3)
    assert [texts.read(index).fields["txt"] for index in range(3)] == [b"a", b"b", b"c"]
    assert texts.name_of(2) == ("texts-000001", "2", text_id("c"))
    assert texts.digest(0) == TextSet(["a", "b"]).digest(0) != texts.digest(1)
