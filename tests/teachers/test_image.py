"""Image vectors: what the model gives for one picture alone."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, ViTModel

from tests.fixtures.emoji import write_shards
from tests.teachers.small_teachers import SMALL_VIT as SMALL
from tests.teachers.small_teachers import save_vit
from trainer.comm import Comm
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError
from trainer.store import EmbeddingStore
from trainer.teachers.efficientnet import SIZES, EfficientNetLite
from trainer.teachers.fill import embed
from trainer.teachers.image import ImageTeacher, Pixels
from trainer.teachers.spec import TeacherSpec, load_teacher


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), count=12, per_shard=7)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


def load(folder: Path, **changes: object) -> ImageTeacher:
    teacher = load_teacher(TeacherSpec(model=str(folder), kind="image", **changes))
    assert isinstance(teacher, ImageTeacher)
    return teacher


@pytest.mark.heavy
@pytest.mark.parametrize(("layer", "pooling"), [(-1, "cls"), (-1, "mean"), (2, "mean")])
def test_vectors_are_those_of_a_full_forward_pass_of_one_image(vit, spec, layer, pooling):
    teacher = load(vit, layer=layer, pooling=pooling, batch_images=5)
    shards = ShardSet.open(spec)
    images = [teacher.read(shards.read(index)) for index in range(12)]
    found = teacher.encode(images)
    assert found.shape == (12, 1, 32)
    model = ViTModel.from_pretrained(vit).double().eval()
    mean, deviation = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]])[:, :, None, None].double()
    for image, vector in zip(images, found[:, 0], strict=True):
        pixels = ((image.double() / 255 - mean) / deviation)[None]
        with torch.no_grad():
            output = model(pixel_values=pixels, output_hidden_states=True)
        states = (output.last_hidden_state if layer == -1 else output.hidden_states[layer])[0]
        expected = states[0] if pooling == "cls" else states.mean(0)
        assert (vector.double() - expected / expected.norm()).abs().max() < 1e-5


@pytest.mark.heavy
def test_the_embedding_of_a_pair_is_the_pairs_own(tmp_path):
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 50, "max_position_embeddings": 8}
    sizes = {name: text.pop(name) for name in ("image_size", "patch_size")}
    config = CLIPConfig(text_config=text, vision_config={**text, **sizes}, projection_dim=24)
    pair = CLIPModel(config).eval()
    pair.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lacks a preprocessor_config"):
        load(tmp_path, pooling="projected")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    teacher = load(tmp_path, pooling="projected", unit_norm=False)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        pixels = teacher.pixels.normalized(image[None])
        expected = pair.visual_projection(pair.vision_model(pixel_values=pixels).pooler_output)
    assert torch.allclose(teacher.encode([image])[:, 0], expected, atol=1e-5)
    assert teacher.identity.dim == 24
    with pytest.raises(ConfigError, match="pooling last is for texts"):
        load(tmp_path, pooling="last")


@pytest.mark.heavy
def test_images_end_up_in_a_store_and_a_bad_one_is_left_out(vit, spec, tmp_path):
    teacher = load(vit)
    teacher.chunk = 4
    done = embed(spec, tmp_path, teacher=teacher, comm=Comm.solo())
    assert (done.computed, done.skipped) == (2, 0)
    store, shards = EmbeddingStore.open(tmp_path), ShardSet.open(spec)
    live = teacher.encode([teacher.read(shards.read(index)) for index in range(12)])[:, 0]
    assert (store.rows(torch.from_numpy(shards.ids)) - live).abs().max() < 1e-3
    assert "32 px, mean 0.5,0.4,0.3" in store.identity.tokenizer


def test_lite_models_pad_strides_to_the_right_and_below():
    """Against a convolution written out by hand on an image of odd and even sides."""
    torch.manual_seed(0)
    stem = EfficientNetLite(SIZES["efficientnet-lite0"]).stem.eval()
    stem.norm = nn.Identity()
    for side in (6, 7):
        image = torch.randn(1, 3, side, side)
        found = stem(image)
        missing = 1 if side % 2 == 0 else 2
        wide = torch.zeros(1, 3, side + missing, side + missing)
        start = missing // 2
        wide[:, :, start : start + side, start : start + side] = image
        weight = stem.convolution.weight
        for row in range(found.shape[2]):
            for column in range(found.shape[3]):
                patch = wide[0, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                expected = (weight * patch).sum((1, 2, 3)).clamp(0, 6)
                assert torch.allclose(found[0, :, row, column], expected, atol=1e-5)


def test_pixels_say_what_they_are():
    pixels = Pixels(size=8, mean=(0.0, 0.0, 0.0), deviation=(1.0, 1.0, 1.0))
    assert pixels.normalized(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)).eq(1).all()
    assert pixels.text == "8 px, mean 0,0,0, deviation 1,1,1, background (255, 255, 255)"
