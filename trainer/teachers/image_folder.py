"""A frozen model of images from a folder: what it pools, and how its images are prepared."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import torch

from trainer.config import IMAGE_FIELDS
from trainer.data.pixels import Pixels, folder_pixels
from trainer.errors import ConfigError
from trainer.models.folder import Loaded, load_folder
from trainer.models.inspection import Sight, inspect_images, leave_out_head
from trainer.teachers.efficientnet import FEATURES, SIZES, EfficientNetLite
from trainer.teachers.frozen import TORCH_DTYPES, Shard
from trainer.teachers.image import ImageTeacher, VisionFeatures
from trainer.teachers.on_disk import placed, settings_of, took, weights_hash
from trainer.teachers.pinned import WEIGHTS
from trainer.teachers.section import TeacherSpec
from trainer.tensor_files import read_tensors

_LITE_MEAN, _LITE_DEVIATION = 127 / 255, 128 / 255


def lite_teacher(
    spec: TeacherSpec, folder: Path, name: str, device: torch.device | str
) -> ImageTeacher:
    size = SIZES[spec.model]
    model = EfficientNetLite(size)
    model.load_state_dict(read_tensors(folder / WEIGHTS, of="weights"))
    pixels = Pixels(
        size=spec.image_size or size.image_size,
        mean=(_LITE_MEAN,) * 3,
        deviation=(_LITE_DEVIATION,) * 3,
        background=spec.background,
    )
    return ImageTeacher(
        model.to(device),
        pixels,
        name=name,
        model_hash=weights_hash(folder),
        pooling="mean of the last maps",
        dim=FEATURES,
        unit_norm=spec.unit_norm,
        batch_images=spec.batch_images,
        images=spec.fields or IMAGE_FIELDS,
    )


def vision_teacher(
    spec: TeacherSpec, folder: Path, name: str, device: torch.device | str, shard: Shard | None
) -> ImageTeacher:
    if spec.pooling == "last":
        raise ConfigError("pooling last is for texts; use mean, cls or projected")
    began = time.perf_counter()
    loaded = load_folder(
        folder, part="image", dtype=TORCH_DTYPES[spec.precision], local_files_only=True
    )
    pixels = _pixels(folder, spec, loaded.backbone)
    sight = inspect_images(loaded.backbone, folder, size=pixels.size)
    how = _image_pooling(spec, loaded, sight, name)
    if how != "projected":
        leave_out_head(loaded.backbone)
    projection = loaded.projection if how == "projected" else None
    dim = int(getattr(projection, "out_features", sight.width))
    features = VisionFeatures(
        placed(spec, loaded.backbone, device),
        how=how,
        layer=spec.layer,
        projection=None if projection is None else projection.to(device),
        shard=shard,
    )
    return ImageTeacher(
        features,
        pixels,
        name=name,
        model_hash=weights_hash(folder),
        pooling=how,
        dim=dim,
        layer=spec.layer,
        unit_norm=spec.unit_norm,
        precision=spec.precision,
        batch_images=spec.batch_images,
        settings=settings_of(folder, pixels=pixels.text),
        note=f"{name}: {type(loaded.backbone).__name__}, pooling {how}, {pixels.text}; "
        f"{took(began)}",
        images=spec.fields or IMAGE_FIELDS,
    )


def _image_pooling(
    spec: TeacherSpec, loaded: Loaded, sight: Sight, name: str
) -> Literal["cls", "mean", "projected"]:
    """The spec's, else what the model pools by itself, its class token, or the mean."""
    asked = spec.pooling
    own = sight.pools or loaded.projection is not None
    if asked == "auto":
        return "projected" if own else "cls" if sight.has_class_token else "mean"
    if asked == "cls" and not sight.has_class_token:
        raise ConfigError(f"{name} has no class token, so pooling can't be cls; use mean or auto")
    if asked == "projected" and not own:
        raise ConfigError(
            f"{name} pools nothing by itself, so pooling can't be projected; use cls or mean"
        )
    if asked == "projected" and spec.layer != -1:
        raise ConfigError("pooling projected runs all blocks; leave out layer, or use mean or cls")
    assert asked != "last"
    return asked


def _pixels(folder: Path, spec: TeacherSpec, model: Any) -> Pixels:
    own = getattr(model.config, "image_size", None)
    pixels = folder_pixels(
        folder,
        size=spec.image_size,
        unsaid=own if isinstance(own, int) else None,
        background=spec.background,
    )
    if pixels is None:
        raise ConfigError(
            f"{folder} lacks a preprocessor_config.json (or processor_config.json) that says how "
            "images are resized and normalised; save the model's image processor into it"
        )
    return pixels
