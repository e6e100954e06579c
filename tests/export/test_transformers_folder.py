"""Exported folders load offline elsewhere and give the embeddings that the trainer computes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPModel, pipeline

from tests.models.small import (
    LENGTH,
    save_bert,
    save_llama,
    small_batch,
    small_config,
    word_tokenizer,
)
from tools import export as tool
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import parse_run
from trainer.data.decode import decode_image
from trainer.data.pixels import Pixels
from trainer.data.tokenize import tokenize
from trainer.data.views import normalize
from trainer.errors import CheckpointError, ConfigError
from trainer.export.native import load_exported, load_trained
from trainer.export.transformers_folder import export_model
from trainer.models.model import Model
from trainer.models.two_tower import TwoTower, build_two_tower
from trainer.recipe import build_model
from trainer.types import Batch

HEAD = {"hidden": 16, "dim": 8}


def moved_model(**changes: object) -> TwoTower:
    """A model whose every number differs from its start, running statistics included."""
    model = build_two_tower(small_config(head=HEAD, **changes), word_tokenizer(), Comm.solo())
    chosen = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.rand(value.shape, generator=chosen) * 0.1)
    return model.eval()


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(4).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@torch.no_grad()
def test_clip_model_gives_the_same_embeddings(tmp_path: Path) -> None:
    model = moved_model()
    exported = export_model(model, word_tokenizer(), tmp_path)
    assert exported.is_whole
    clip = CLIPModel.from_pretrained(tmp_path).eval()
    batch = small_batch(6)
    ours = model(batch)
    theirs = clip(
        input_ids=batch.tokens,
        attention_mask=batch.token_mask.long(),
        pixel_values=batch.images,
    )
    torch.testing.assert_close(theirs.image_embeds, ours.image, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.text_embeds, ours.text, rtol=0, atol=1e-5)
    logits = ours.logit_scale * ours.image @ ours.text.T
    torch.testing.assert_close(theirs.logits_per_image, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokenizer_and_image_processor_feed_the_model_as_the_trainer_does(tmp_path: Path) -> None:
    model = moved_model()
    export_model(model, word_tokenizer(), tmp_path)
    clip = CLIPModel.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    names = ["word3 word1", "word7"]
    tokens = tokenizer(names, padding=True, return_token_type_ids=False, return_tensors="pt")
    full = word_tokenizer()(names, padding="max_length", max_length=LENGTH, return_tensors="pt")
    batch = small_batch(2)._replace(
        images=None, tokens=full["input_ids"], token_mask=full["attention_mask"].bool()
    )
    theirs = clip.get_text_features(**tokens).pooler_output
    theirs = theirs / theirs.norm(dim=1, keepdim=True)
    torch.testing.assert_close(theirs, model(batch).text, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "L", "P", "1", "I;16")),
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        ("WEBP", "RGB"),
    ],
)
def test_the_exported_processor_gives_the_very_pixels_of_an_evaluation(kind, mode) -> None:
    """Odd shapes: the long side's rounding, the crop's offset, sizes that a JPEG draft would take,
    pictures of one column."""
    processor = Pixels(33).processor()
    for size in [(33, 33), (34, 33), (75, 100), (100, 75), (41, 30), (200, 333), (1, 50), (3, 7)]:
        file, image = io.BytesIO(), picture(*size)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 256 + 77)
        else:
            image = image.convert(mode)
        image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
        pixels = decode_image(file.getvalue(), size=33, background=(255,) * 3, max_pixels=10**6)
        ours = normalize(pixels.unsqueeze(0))
        read = Image.open(file)
        if mode == "I;16":
            read = Image.fromarray((np.asarray(read) // 256).astype(np.uint8))
        theirs = processor(read.convert("RGB"), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@torch.no_grad()
def test_pipelines_and_auto_processor_need_no_further_arguments(tmp_path: Path) -> None:
    model = moved_model()
    export_model(model, word_tokenizer(), tmp_path)
    image, names = picture(50, 40), ["word3 word1", " ".join(["word7"] * 40)]
    processor = AutoProcessor.from_pretrained(tmp_path)
    batch = processor(text=names, images=image, padding=True, truncation=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert batch["input_ids"].shape[1] == LENGTH
    logits = CLIPModel.from_pretrained(tmp_path).eval()(**batch).logits_per_image
    tokens, mask = tokenize(word_tokenizer(), names, length=LENGTH)
    ours = model(Batch(batch["pixel_values"], tokens, mask, torch.arange(2)))
    expected = ours.logit_scale * ours.image @ ours.text.T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    ask = pipeline("zero-shot-image-classification", model=str(tmp_path))
    found = {row["label"]: row["score"] for row in ask(image, candidate_labels=["word3", "word1"])}
    assert set(found) == {"word3", "word1"}
    assert sum(found.values()) == pytest.approx(1.0)


@torch.no_grad()
def test_a_sigmoid_model_says_its_scale_and_bias(tmp_path: Path) -> None:
    model = build_two_tower(small_config(bias=True), word_tokenizer()).eval()
    model.logit_bias.shift.add_(1.25)
    exported = export_model(model, word_tokenizer(), tmp_path)
    assert "sigmoid(logit + config.logit_bias), here -8.7500" in exported.beside
    clip, batch = CLIPModel.from_pretrained(tmp_path).eval(), small_batch()
    logits = clip(
        input_ids=batch.tokens, attention_mask=batch.token_mask, pixel_values=batch.images
    ).logits_per_image
    ours = model(batch)
    expected = torch.sigmoid(ours.logit_scale * ours.image @ ours.text.T + ours.logit_bias)
    found = torch.sigmoid(logits + clip.config.logit_bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    card = (tmp_path / "README.md").read_text()
    assert "10.0000 times the cosine, plus a bias of -8.7500" in card
    assert "torch.sigmoid(logits + model.config.logit_bias)" in card
    assert "softmax(" not in card


@torch.no_grad()
def test_what_a_method_trains_beside_two_towers_stays_behind(tmp_path: Path) -> None:
    model = moved_model()
    model.extra = torch.nn.Linear(3, 3)
    export_model(model, word_tokenizer(), tmp_path)
    loaded, _ = load_exported(tmp_path)
    assert torch.equal(loaded(small_batch()).image, model(small_batch()).image)


class Stranger(Model):
    """A model of a method that nobody here knows."""

    def gradient_checkpointing(self, enabled: bool) -> None: ...

    def parameter_depth(self, name: str) -> tuple[str, int]:
        return "other", 0


def test_a_model_of_no_known_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no form is known to export a Stranger"):
        export_model(Stranger(), None, tmp_path)


@pytest.mark.heavy
@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "llama", "bert"])
@pytest.mark.parametrize("trained", [True, False])
def test_native_weights_come_back_bit_for_bit_without_the_original_folders(
    kind: str, trained: bool, tmp_path: Path
) -> None:
    save = {"llama": save_llama, "bert": save_bert}.get(kind)
    text = {"path": save(tmp_path / "before")} if save else {"width": 32, "layers": 2, "heads": 2}
    model = moved_model(text={**text, "trained": trained})
    expected = model(small_batch())
    exported = export_model(model, word_tokenizer(), tmp_path / "out")
    assert exported.is_whole == (kind == "clip")
    if save:
        (tmp_path / "before").rename(tmp_path / "gone")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    loaded, tokenizer = load_exported(tmp_path / "elsewhere")
    result = loaded(small_batch())
    assert len(tokenizer) == len(word_tokenizer())
    for before, after in zip(expected, result, strict=True):
        assert (before is None and after is None) or torch.equal(before, after)
    if kind != "clip":
        alone = AutoModel.from_pretrained(tmp_path / "elsewhere" / "text")
        ours = model.text.backbone.state_dict()
        assert all(torch.equal(v, ours[n]) for n, v in alone.state_dict().items() if n in ours)


@pytest.mark.heavy
@torch.no_grad()
def test_a_clip_that_was_loaded_from_a_folder_exports_as_clip_again(tmp_path: Path) -> None:
    export_model(moved_model(), word_tokenizer(), tmp_path / "first")
    path = {"path": str(tmp_path / "first")}
    config = small_config(image=path, text=path, logit_scale_init=20.0)
    again = build_two_tower(config, word_tokenizer()).eval()
    original = moved_model()(small_batch())
    torch.testing.assert_close(again(small_batch()).image, original.image, rtol=0, atol=1e-5)
    torch.testing.assert_close(again(small_batch()).text, original.text, rtol=0, atol=1e-5)
    assert export_model(again, word_tokenizer(), tmp_path / "second").is_whole
    loaded, _ = load_exported(tmp_path / "second")
    assert torch.equal(loaded(small_batch()).text, again(small_batch()).text)


def test_an_end_token_that_clip_misreads_gives_towers_and_says_why(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(("[pad]", "[begin]", "[end]"))
    assert tokenizer.eos_token_id == 2
    model = build_two_tower(small_config(), tokenizer)
    exported = export_model(model, tokenizer, tmp_path)
    assert not exported.is_whole
    assert "id 2" in exported.why_apart
    assert exported.why_apart in (tmp_path / "README.md").read_text()
    assert (tmp_path / "text" / "config.json").exists()


def test_model_card_states_input_and_licence(tmp_path: Path) -> None:
    export_model(moved_model(), word_tokenizer(), tmp_path, data_licence="Pictures: CC BY 4.0.")
    card = (tmp_path / "README.md").read_text()
    for part in ["32 x 32 pixels", "0.48145466", "0.26862954", "at most 12 tokens", "CC BY 4.0"]:
        assert part in card


def test_the_code_of_the_model_card_runs_offline_in_a_bare_process(tmp_path: Path) -> None:
    export_model(moved_model(), word_tokenizer(), tmp_path)
    picture(40, 40).save(tmp_path / "picture.png")
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "tensor([[" in result.stdout


def run_yaml(**model: object) -> str:
    sizes = {"width": 32, "layers": 2, "heads": 2}
    values = small_config(image=sizes, text=sizes, **model).model_dump(mode="json")
    return yaml.safe_dump(
        {
            "workdir": "runs/x",
            "steps": 1,
            "global_batch": 2,
            "recipe": {"name": "protoclip" if "head" in model else "clip", "model": values},
            "data": {"train": "a.tar"},
        }
    )


@torch.no_grad()
def test_a_run_and_its_weights_make_the_model_again() -> None:
    model = moved_model()
    run = parse_run(run_yaml(head=HEAD))
    held = {name: value.clone() for name, value in model.state_dict().items()}
    held |= dict(model.named_buffers())
    rebuilt = build_model(run.recipe, word_tokenizer(), Comm.solo(), seed=run.seed).eval()
    load_trained(rebuilt, held)
    assert torch.equal(rebuilt(small_batch()).image_projected, model(small_batch()).image_projected)


@pytest.mark.heavy
def test_the_tool_exports_the_newest_checkpoint_of_a_workdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = moved_model()
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    checkpoints = Checkpointer(tmp_path / "checkpoints", Comm.solo())
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    held = {name: value.detach() for name, value in weights.items()}
    checkpoints.save(
        7, {"weights": held}, {"frozen_weights": ""}, {"run.yaml": run_yaml(head=HEAD)}
    )
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path), "--data-licence", "Ours."])
    tool.main()
    said = capsys.readouterr().out
    assert "step 7" in said
    assert re.search(r"transformers CLIPModel: image within \d\.\de-0[789], text within", said)
    card = (tmp_path / "export" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "zero-shot-image-classification"
    assert "Ours." in card
    modes = [path.stat().st_mode & 0o444 for path in (tmp_path / "export").rglob("*")]
    assert set(modes) == {0o444}, "others can read it"
    clip = CLIPModel.from_pretrained(tmp_path / "export").eval()
    batch = small_batch()
    with torch.no_grad():
        theirs = clip.get_image_features(pixel_values=batch.images).pooler_output
        ours = model(batch).image
    torch.testing.assert_close(theirs / theirs.norm(dim=1, keepdim=True), ours, rtol=0, atol=1e-5)
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "tokenizer")])
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        tool.main()


def test_weights_of_another_model_are_refused() -> None:
    model = moved_model()
    weights = model.state_dict()
    less = {name: value for name, value in weights.items() if name != "text.projection.weight"}
    with pytest.raises(CheckpointError, match="1 tensors stand on one side only, as text"):
        load_trained(model, less)
    with pytest.raises(CheckpointError, match="as stranger"):
        load_trained(model, {**weights, "stranger": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_trained(model, {**weights, "text.projection.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match="is no exported model"):
        load_exported(Path("nowhere"))
