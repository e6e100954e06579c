"""What a folder says about its pixels: equal to transformers' own processor, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import (
    EfficientNetImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from trainer.data.pixels import Pixels, folder_pixels
from trainer.errors import ConfigError

SHAPES = [(97, 61), (40, 90), (64, 64), (31, 500)]

PROCESSORS: dict[str, Any] = {
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
    "dinov2": lambda: BitImageProcessorPil(size={"shortest_edge": 48}, crop_size=35),
    "siglip": lambda: SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    "vit": lambda: ViTImageProcessorPil(size={"height": 56, "width": 56}),
    "raw": lambda: ViTImageProcessorPil(size=40, do_normalize=False),
    "bytes": lambda: ViTImageProcessorPil(size=40, do_rescale=False, do_normalize=False),
    "half": lambda: ViTImageProcessorPil(size=40, rescale_factor=1 / 127.5, resample=0),
    "beit": lambda: BeitImageProcessorPil(size=48, crop_size=32, do_center_crop=True),
    "deit": lambda: DeiTImageProcessorPil(size=48, crop_size=30),
    "padded": lambda: CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=32),
    "convnext": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 64}),
    "convnext, large": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 384}),
}


def noise(width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(width)
    values = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("nested", [False, True], ids=["preprocessor", "processor"])
def test_pixels_are_those_of_the_folders_own_processor(
    name: str, nested: bool, tmp_path: Path
) -> None:
    processor = PROCESSORS[name]()
    if nested:
        values = {"processor_class": "P", "image_processor": processor.to_dict()}
        (tmp_path / "processor_config.json").write_text(json.dumps(values))
    else:
        processor.save_pretrained(tmp_path)
    pixels = folder_pixels(tmp_path)
    assert pixels is not None
    for shape in SHAPES:
        own = torch.as_tensor(processor(noise(*shape), return_tensors="pt")["pixel_values"]).float()
        ours = pixels.normalized(pixels.arranged(noise(*shape))[None])
        assert ours.shape == own.shape
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=2e-5 if pixels.scale < 1 else 1e-3)


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_processor_that_an_export_writes_does_the_same(name: str, tmp_path: Path) -> None:
    PROCESSORS[name]().save_pretrained(tmp_path / "own")
    pixels = folder_pixels(tmp_path / "own")
    assert pixels is not None
    pixels.processor().save_pretrained(tmp_path / "written")
    assert folder_pixels(tmp_path / "written") == pixels
    again = AutoImageProcessor.from_pretrained(tmp_path / "written")
    ours = pixels.normalized(pixels.arranged(noise(97, 61))[None])
    theirs = torch.as_tensor(again(noise(97, 61), return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5 if pixels.scale < 1 else 1e-3)


def test_another_size_changes_all_lengths_in_proportion(tmp_path: Path) -> None:
    PROCESSORS["dinov2"]().save_pretrained(tmp_path)
    pixels = folder_pixels(tmp_path, size=70)
    assert pixels is not None
    assert (pixels.size, pixels.edge) == (70, 96)


def test_a_class_that_needs_torchvision_is_read_from_its_file(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert folder_pixels(tmp_path) == Pixels(32, mean, deviation, fit="square", edge=32, resample=2)
    del values["image_mean"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="does not say image_mean"):
        folder_pixels(tmp_path)


def test_a_folder_that_says_nothing_is_not_guessed_at(tmp_path: Path) -> None:
    assert folder_pixels(tmp_path) is None
    (tmp_path / "processor_config.json").write_text('{"processor_class": "TextOnly"}')
    assert folder_pixels(tmp_path) is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ViTImageProcessorPil(do_resize=False), "do_resize"),
        (lambda: ViTImageProcessorPil(size={"height": 32, "width": 48}), "only squares"),
        (lambda: CLIPImageProcessorPil(do_center_crop=False), "several shapes"),
        (lambda: EfficientNetImageProcessorPil(rescale_offset=True), "does more to an image"),
    ],
)
def test_what_is_not_known_is_refused_by_name(make: Any, says: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=says):
        folder_pixels(tmp_path)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(ConfigError, match="no readable JSON"):
        folder_pixels(tmp_path)


def test_a_very_long_image_does_not_fill_the_memory() -> None:
    pixels = Pixels(16, fit="shortest", edge=24)
    line = Image.new("RGB", (3_000_000, 2), (10, 200, 30))
    assert pixels.arranged(line).flatten(1).unique(dim=1).tolist() == [[10], [200], [30]]
