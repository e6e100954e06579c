"""Models whose layers were cut to different widths, exported: equal where a class has room."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from tests.models.small import small_batch, small_config, word_tokenizer
from trainer.errors import ConfigError
from trainer.export.card_facts import OWN
from trainer.export.cut import heads_that_hold
from trainer.export.equality import compare_forms
from trainer.export.native import load_exported
from trainer.export.transformers_folder import export_model
from trainer.models.folder import load_pair
from trainer.models.narrow import NarrowShape, narrowed, shape_of
from trainer.models.two_tower import TwoTower, build_two_tower

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"width": 32, "layers": 2, "heads": 4}
ROOMY = NarrowShape(width=20, head_dim=8, heads=(2, 1), neurons=(7, 30))
EMPTY = NarrowShape(width=24, head_dim=8, heads=(0, 3), neurons=(0, 11))
TIGHT = NarrowShape(width=20, head_dim=8, heads=(3, 4), neurons=(7, 30))


def cut_model(folder: Path | None = None, **shapes: NarrowShape) -> TwoTower:
    """Every number drawn; towers from a folder where there is one, as a run of learned gates."""
    sections: dict[str, Any] = {"image": SIZES, "text": SIZES}
    model = build_two_tower(small_config(**sections), word_tokenizer()).eval()
    if folder is not None:
        export_model(model, word_tokenizer(), folder)
        path = {"path": str(folder)}
        model = build_two_tower(small_config(image=path, text=path), word_tokenizer()).eval()
    for name, shape in shapes.items():
        setattr(model, name, narrowed(getattr(model, name), shape))
    chosen = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=chosen) * 0.2)
    return model.eval()


@torch.no_grad()
def test_one_head_that_is_left_is_not_taken_for_one_of_the_towers_width(tmp_path: Path) -> None:
    """A tower of one head that lost channels alone: its head stays as wide as it was."""
    one = {"width": 32, "layers": 2, "heads": 1}
    model = build_two_tower(small_config(image=one, text=one), word_tokenizer()).eval()
    whole = shape_of(model.image)
    model.image = narrowed(model.image, NarrowShape(28, 32, (1, 1), (128, 128)))
    assert (whole, shape_of(model.image)) == (None, NarrowShape(28, 32, (1, 1), (128, 128)))
    for value in model.image.parameters():
        torch.nn.init.normal_(value, std=0.2)
    assert export_model(model.eval(), word_tokenizer(), tmp_path / "out").loads_as == OWN
    again, _ = load_exported(tmp_path / "out")
    assert torch.equal(again(small_batch()).image, model(small_batch()).image)
    with pytest.raises(ConfigError, match="cut to widths that no class of transformers holds"):
        load_pair(tmp_path / "out")


@pytest.mark.heavy
@pytest.mark.parametrize(("image", "text"), [(ROOMY, EMPTY), (EMPTY, ROOMY), (ROOMY, None)])
@torch.no_grad()
def test_a_cut_model_is_filled_up_with_zeros_and_says_the_same(
    image: NarrowShape, text: NarrowShape | None, tmp_path: Path
) -> None:
    """Heads of 8 in a width of 20 become two of 10; layers without heads or neurons say a bias."""
    shapes = {"image": image} | ({} if text is None else {"text": text})
    model, tokenizer = cut_model(**shapes), word_tokenizer()
    has_open_clip = all(map(importlib.util.find_spec, ("open_clip", "torchvision")))
    exported = export_model(model, tokenizer, tmp_path / "out", open_clip=True)
    assert (exported.loads_as, exported.is_whole) == ("CLIPModel", True)
    forms = {
        each.form: each
        for each in compare_forms(model, tokenizer, tmp_path / "out", loads_as="CLIPModel")
    }
    assert forms.keys() == {"transformers CLIPModel", "native", "open_clip"}
    assert all(each.skipped for each in forms.values()) is False
    assert bool(forms["open_clip"].skipped) is not has_open_clip
    assert max(max(each.furthest.values(), default=0.0) for each in forms.values()) < 1e-5
    clip, batch = CLIPModel.from_pretrained(tmp_path / "out").eval(), small_batch()
    theirs = clip(
        input_ids=batch.tokens, attention_mask=batch.token_mask, pixel_values=batch.images
    )
    torch.testing.assert_close(theirs.image_embeds, model(batch).image, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.text_embeds, model(batch).text, rtol=0, atol=1e-5)
    assert "cut: 2 layers of width" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.heavy
@torch.no_grad()
def test_a_cut_model_that_no_class_holds_is_exported_by_our_own_names(tmp_path: Path) -> None:
    model, tokenizer = cut_model(tmp_path / "whole", image=TIGHT, text=ROOMY), word_tokenizer()
    exported = export_model(model, tokenizer, tmp_path / "out")
    assert (exported.loads_as, exported.is_whole) == (OWN, False)
    assert "a layer of the image tower has 4 heads of 8" in exported.why_apart
    (tmp_path / "whole").rename(tmp_path / "gone")
    (tmp_path / "out").rename(tmp_path / "moved")
    again, _ = load_exported(tmp_path / "moved")
    batch = small_batch()
    assert torch.equal(again(batch).image, model(batch).image)
    assert torch.equal(again(batch).text, model(batch).text)
    assert (shape_of(again.image), shape_of(again.text)) == (TIGHT, ROOMY)
    [found] = compare_forms(model, tokenizer, tmp_path / "moved", loads_as=exported.loads_as)
    assert (found.form, found.furthest) == ("native", {"image": 0.0, "text": 0.0})
    assert exported.why_apart in (tmp_path / "moved" / "README.md").read_text()
    assert not (tmp_path / "moved" / "image").exists()


def test_open_clip_refuses_what_does_not_fit_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 4 heads of 8.* export it without --open-clip"):
        export_model(cut_model(image=TIGHT), word_tokenizer(), tmp_path, open_clip=True)


def test_graphs_of_a_cut_model_need_no_class(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    model, tokenizer = cut_model(image=TIGHT, text=EMPTY), word_tokenizer()
    export_model(model, tokenizer, tmp_path, onnx=True)
    found = compare_forms(model, tokenizer, tmp_path, loads_as=OWN)
    assert [each.form for each in found] == ["native", "onnxruntime"]
    assert max(found[1].furthest.values()) < 1e-5


def test_whole_heads_are_as_many_as_fit() -> None:
    assert heads_that_hold(ROOMY) == 2
    assert heads_that_hold(EMPTY) == 3
    assert heads_that_hold(TIGHT) is None
