"""Runs of each recipe, exported: every program, fed by its own means, gives the trainer's vectors.

Pictures go through each program's own preparation and texts through its own tokenizer, so that an
export whose weights are right and whose files say something else about the input is found too.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from tests.fixtures.emoji import read_pairs, write_shards
from tests.ranks import run_ranks
from tests.teachers.small_teachers import save_llama
from tools import embed as embed_tool
from tools import export as export_tool
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run
from trainer.data.tokenize import tokenize
from trainer.models.load import model_pixels
from trainer.programs.workdir import open_workdir
from trainer.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore")
FURTHEST = 1e-5
RUN = """
workdir: {folder}/{name}
steps: 3
global_batch: 8
deepspeed: ds_configs/zero0.json
recipe: {recipe}
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.01}}
log_every: 1 steps
"""
SIZES = "image_size: 32, patch_size: 16, embed_dim: 32, image: {width: 32, layers: 2, heads: 2}"
PAIR = f"{SIZES}, text_length: 12, vocabulary: 400, text: {{width: 32, layers: 2, heads: 2}}"
RECIPES = {
    "clip": f"{{name: clip, model: {{{PAIR}}}}}",
    "siglip": f"{{name: siglip, model: {{{PAIR}}}}}",
    "protoclip": f"{{name: protoclip, model: {{{PAIR}, head: {{hidden: 16, dim: 8}}}}, clusters: 4,"
    " episode_samples: 16, warmup_episodes: 1}",
    "mlcd": f"{{name: mlcd, model: {{{SIZES}}}, classes: [concept_id, subgroup],"
    " head: {sample_rate: 1.0}}",
    "palm": f"{{name: palm, model: {{{SIZES}, head: {{hidden: 16, dim: 8, norm: none}}}},"
    " classes: subgroup}",
    "flame": f"{{name: flame, store: '{{folder}}/store', head_hidden: 24, model: {{{SIZES}}}}}",
}
LOADED_AS = {
    **dict.fromkeys(("clip", "siglip", "protoclip"), "transformers CLIPModel"),
    **dict.fromkeys(("mlcd", "palm"), "transformers CLIPVisionModelWithProjection"),
    "flame": "transformers towers apart",
}
TEXTS = ["a red apple", "two cats", "flag " * 30]


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


OPEN_CLIP = installed("open_clip", "torchvision")
ONNX = installed("onnx", "onnxscript", "onnxruntime")


def train_each(comm: Comm, *configs: RunConfig) -> list[int]:
    from trainer.loop import train

    return [train(config).progress.step for config in configs]


def trained(folder: Path, names: Sequence[str]) -> None:
    """All runs in one launch."""
    spec = write_shards(folder / "shards", count=40, per_shard=20)
    if "flame" in names:
        write_store(folder, spec)
    recipes = {name: RECIPES[name].replace("{folder}", str(folder)) for name in names}
    configs = [
        parse_run(RUN.format(folder=folder, name=name, recipe=recipe, spec=spec))
        for name, recipe in recipes.items()
    ]
    assert run_ranks(train_each, 1, *configs, timeout_seconds=500) == [[3] * len(names)]


def write_store(folder: Path, spec: str) -> None:
    words = ["--teacher", str(save_llama(folder / "llm")), "prompts=flame", "pooling=last"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["embed.py", *words, "--data", spec, "--out", f"{folder}/store"])
        patch.setattr(embed_tool.Comm, "from_environment", embed_tool.Comm.solo)
        embed_tool.main()


def exported(workdir: Path, *, open_clip: bool, onnx: bool) -> None:
    wanted = ["--open-clip"] * open_clip + ["--onnx"] * onnx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", str(workdir), *wanted])
        export_tool.main()


def check(name: str, folder: Path, said: str) -> None:
    """What the export printed, then every program on a picture's file."""
    workdir = folder / name
    forms = {LOADED_AS[name], "native"}
    forms |= {"open_clip"} if OPEN_CLIP and "CLIPModel" in LOADED_AS[name] else set()
    forms |= {"onnxruntime"} if ONNX else set()
    lines = dict(re.findall(r"^([^:\n]+): (.*) of the trainer's embeddings$", said, re.MULTILINE))
    assert set(lines) == forms
    assert all(float(number) < FURTHEST for line in lines.values() for number in numbers(line))
    file = workdir / "picture.png"
    file.write_bytes(read_pairs(50)[49]["png"])
    truth = by_the_trainer(workdir, file)
    found = list(every_program(name, workdir / "export", file))
    assert len(found) >= 1 + (1 + ("text" in truth)) * ONNX - (name == "flame")
    for vectors in found:
        for modality, rows in vectors.items():
            torch.testing.assert_close(rows, truth[modality], rtol=0, atol=FURTHEST)


def numbers(line: str) -> list[str]:
    return re.findall(r"within (\S+?)(?:,|$)", line)


@torch.no_grad()
def by_the_trainer(workdir: Path, file: Path) -> dict[str, Tensor]:
    model, tokenizer = open_workdir(workdir, Comm.solo())[1:3]
    pixels = model_pixels(model.config)
    images = pixels.normalized(pixels.decode(file.read_bytes(), max_pixels=10**6)[None])
    tokens = mask = None
    if tokenizer is not None:
        tokens, mask = tokenize(tokenizer, TEXTS, length=model.config.text_length)
    features = model(Batch(images, tokens, mask, torch.arange(1)))
    found = {"image": features.image, "text": features.text}
    return {key: rows for key, rows in found.items() if rows is not None}


@torch.no_grad()
def every_program(name: str, folder: Path, file: Path) -> Any:
    """Unit vectors by transformers, and by open_clip and onnxruntime where they are installed."""
    white = Image.open(file).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", white.size, "white"), white).convert("RGB")
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
    kind = LOADED_AS[name].removeprefix("transformers ")
    if kind != "towers apart":
        model = getattr(transformers, kind).from_pretrained(folder).eval()
    if kind == "CLIPModel":
        words = transformers.AutoTokenizer.from_pretrained(folder)
        texts = words(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
        said = model(**pixels, **texts)
        yield {"image": said.image_embeds, "text": said.text_embeds}
        if ONNX:
            fed = {"tokens": texts["input_ids"], "mask": texts["attention_mask"]}
            yield {"text": by_onnx(folder / "onnx" / "text.onnx", fed)}
    elif kind != "towers apart":
        yield {"image": normalize(model(**pixels).image_embeds, dim=1)}
    if ONNX:
        fed = {"pixels": pixels["pixel_values"]}
        yield {"image": by_onnx(folder / "onnx" / "image.onnx", fed)}
    if OPEN_CLIP and kind == "CLIPModel":
        yield by_open_clip(folder, picture)


def by_onnx(path: Path, fed: dict[str, Tensor]) -> Tensor:
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [rows] = session.run(None, {key: value.numpy() for key, value in fed.items()})
    return torch.from_numpy(rows)


def by_open_clip(folder: Path, picture: Image.Image) -> dict[str, Tensor]:
    open_clip: Any = importlib.import_module("open_clip")
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    return {
        "image": model.encode_image(prepare(picture)[None], normalize=True),
        "text": model.encode_text(tokens, normalize=True),
    }


@pytest.mark.heavy
def test_a_run_with_prototype_heads_is_equal_in_every_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, ["protoclip"])
    exported(tmp_path / "protoclip", open_clip=OPEN_CLIP, onnx=ONNX)
    check("protoclip", tmp_path, capsys.readouterr().out)


@pytest.mark.slow
def test_runs_of_every_recipe_are_equal_in_every_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for packages in (("open_clip", "torchvision"), ("onnx", "onnxscript", "onnxruntime")):
        if not installed(*packages):
            pytest.skip(f"this needs {' and '.join(packages)}")
    trained(tmp_path, list(RECIPES))
    for name in RECIPES:
        capsys.readouterr()
        pairs = "CLIPModel" in LOADED_AS[name]
        exported(tmp_path / name, open_clip=pairs, onnx=True)
        check(name, tmp_path, capsys.readouterr().out)
