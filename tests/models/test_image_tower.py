"""An image tower alone is the image side of the two-tower model, and needs no text anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

from tests.models.small import small_batch, small_config, word_tokenizer
from trainer.errors import CheckpointError, DataError
from trainer.export.native import load_exported, load_exported_image_tower, load_trained
from trainer.export.transformers_folder import export_model
from trainer.models.image_tower import ImageTower, ImageTowerConfig, build_image_tower
from trainer.models.two_tower import build_two_tower

SIZES = {"image": {"width": 32, "layers": 2, "heads": 2}, "embed_dim": 24}
HEAD = {"hidden": 16, "dim": 8, "norm": "layer"}


def config(**changes: object) -> ImageTowerConfig:
    return ImageTowerConfig.model_validate({**SIZES, "image_size": 32, "patch_size": 16, **changes})


def moved_tower(**changes: object) -> ImageTower:
    model = build_image_tower(config(**changes), seed=3)
    chosen = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.rand(value.shape, generator=chosen) * 0.1)
    return model.eval()


def test_presets_fill_what_is_not_given_and_say_nothing_of_texts():
    values = ImageTowerConfig(preset="vit_l_14").model_dump()
    assert values["image"]["width"] == 1024
    assert (values["embed_dim"], values["patch_size"], values["head"]) == (768, 14, None)
    assert not {"text", "vocabulary", "text_length", "tokenizer"} & values.keys()
    assert ImageTowerConfig(**values) == ImageTowerConfig(preset="vit_l_14")
    with pytest.raises(ValueError, match="image_size 33 is not divisible"):
        config(image_size=33)


@torch.no_grad()
def test_it_is_the_image_side_of_a_two_tower_model_of_the_same_seed():
    alone = build_image_tower(config(head=HEAD), seed=3).eval()
    pair = build_two_tower(small_config(head=HEAD), word_tokenizer(), seed=3).eval()
    ours, theirs = alone(small_batch()), pair(small_batch())
    assert torch.equal(ours.image, theirs.image)
    assert torch.equal(ours.image_projected, theirs.image_projected)
    assert [name for name, value in ours._asdict().items() if value is not None] == [
        "image",
        "image_projected",
    ]
    for name in alone.state_dict():
        assert alone.parameter_depth(name) == pair.parameter_depth(name)
    counts = alone.count_parameters()
    assert counts["total"] == counts["trained"] == sum(p.numel() for p in alone.parameters())


def test_a_batch_without_images_is_refused():
    with pytest.raises(DataError, match="without images"):
        build_image_tower(config())(small_batch()._replace(images=None))


@torch.no_grad()
def test_transformers_loads_the_exported_tower_with_and_without_its_projection(tmp_path: Path):
    model, batch = moved_tower(), small_batch()
    exported = export_model(model, None, tmp_path)
    assert exported.is_whole
    assert exported.loads_as == "CLIPVisionModelWithProjection"
    whole = CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    rows = torch.nn.functional.normalize(whole(batch.images).image_embeds, dim=-1)
    torch.testing.assert_close(rows, model(batch).image, rtol=0, atol=1e-6)
    bare = CLIPVisionModel.from_pretrained(tmp_path).eval()
    pooled = model.image.backbone(batch.images).pooler_output
    torch.testing.assert_close(bare(batch.images).pooler_output, pooled, rtol=0, atol=1e-6)
    card = (tmp_path / "README.md").read_text()
    assert "32 x 32 pixels" in card
    assert "tokenizer" not in card.lower()
    assert not (tmp_path / "tokenizer.json").exists()


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_the_native_form_comes_back_bit_for_bit(pooling: str, tmp_path: Path):
    model = moved_tower(head=HEAD, image={**SIZES["image"], "pooling": pooling})
    exported = export_model(model, None, tmp_path / "out")
    assert exported.is_whole == (pooling == "auto")
    again = load_exported_image_tower(tmp_path / "out")
    for before, after in zip(model(small_batch()), again(small_batch()), strict=True):
        assert (before is None and after is None) or torch.equal(before, after)
    with pytest.raises(CheckpointError, match="no text tower"):
        load_exported(tmp_path / "out")


def test_weights_of_another_tower_are_refused():
    weights = moved_tower().state_dict()
    with pytest.raises(CheckpointError, match="as stranger"):
        load_trained(moved_tower(), {**weights, "stranger": torch.zeros(1)})
