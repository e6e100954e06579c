"""A frozen pair of towers that runs beside a student, on the very views and tokens it is given."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from transformers import PreTrainedTokenizerFast

from trainer.data.pixels import Pixels, folder_pixels
from trainer.data.tokenize import load_tokenizer, tokenizer_digest
from trainer.errors import ConfigError
from trainer.models.fitting import check_length
from trainer.models.folder import folder_settings, load_pair, settings_hash
from trainer.models.folder_tower import own_image_tower, own_text_tower, pair_scales
from trainer.models.inspection import inspect_images, inspect_text
from trainer.models.tower import Tower
from trainer.teachers.frozen import TORCH_DTYPES, Precision
from trainer.teachers.on_disk import weights_hash
from trainer.teachers.own_vectors import OwnVectors


class FrozenPair(nn.Module):
    """Normalised pixels and token ids to the teacher's own unit vectors."""

    def __init__(self, image: Tower, text: OwnVectors) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(
        self,
        pixels: Float[Tensor, "batch 3 size size"],
        tokens: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
    ) -> tuple[Float32[Tensor, "batch dim"], Float32[Tensor, "batch dim"]]:
        kind = next(self.parameters()).dtype
        rows = self.image.images(pixels.to(kind)).float(), self.text(tokens, mask)
        return normalize(rows[0], dim=-1), normalize(rows[1], dim=-1)


class LivePair(NamedTuple):
    """A pair that was loaded, with what one has to know to run it."""

    model: FrozenPair
    pixels: Pixels
    """How its folder prepares images."""
    scale: float | None
    """Its own multiplier of cosines; None where it says none."""
    digest: str
    """SHA-256 of weights, settings, tokenizer and pixels."""
    note: str
    """What was found, for people."""


def load_live_pair(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    length: int,
    precision: Precision = "float32",
) -> LivePair:
    """The pair at `folder`, for rows of at most `length` ids of `tokenizer`; on the CPU.

    ConfigError where the folder is no pair, does not say how images are prepared, reads texts with
    another tokenizer or reads no rows so long.
    """
    began, path = time.perf_counter(), str(folder)
    image, text = load_pair(folder, dtype=TORCH_DTYPES[precision])
    pixels = _pixels(folder, image.backbone)
    refuse_other_tokenizer(folder, tokenizer)
    sight = inspect_images(image.backbone, folder, size=pixels.size, of_pair=True)
    reach = inspect_text(text.backbone, tokenizer, folder, length=length, of_pair=True)
    check_length(reach, length, path)
    own_texts = own_text_tower(text, reach, tokenizer, path, length=reach.row or length)
    dim = int(getattr(own_texts.projection, "out_features", reach.width))
    pad_token = int(tokenizer.pad_token_id)
    model = FrozenPair(
        own_image_tower(image, sight, path, size=pixels.size),
        OwnVectors(own_texts, dim=dim, row=reach.row, pad_token=pad_token),
    )
    found, scales = time.perf_counter() - began, pair_scales(image)
    return LivePair(
        model,
        pixels,
        None if scales is None else scales.scale,
        _digest(folder, tokenizer, pixels),
        f"teacher: {type(image.pair).__name__} of {folder}, {precision}; {pixels.text}; loaded and "
        f"looked at in {found:.1f} s",
    )


def as_seen_by(
    teacher: Pixels, student: Pixels, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch 3 size size"]:
    """The student's normalised pixels as the teacher is used to them: resized and normalised anew.

    The same tensor where both are prepared alike.
    """
    alike = (student.size, student.unit_mean, student.unit_deviation) == (
        *(teacher.size, teacher.unit_mean, teacher.unit_deviation),
    )
    if alike:
        return images
    unit = images * _column(student.unit_deviation, images) + _column(student.unit_mean, images)
    if student.size != teacher.size:
        size = (teacher.size, teacher.size)
        unit = interpolate(unit, size, mode="bicubic", antialias=True).clamp(0, 1)
    return (unit - _column(teacher.unit_mean, images)) / _column(teacher.unit_deviation, images)


def refuse_other_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """ConfigError where the pair reads a text as other ids than the student does."""
    if tokenizer_digest(load_tokenizer(str(folder))) != tokenizer_digest(tokenizer):
        raise ConfigError(
            f"{folder} reads texts with a tokenizer of its own, and the student's rows are of "
            f"another; set recipe.model.tokenizer={folder}, or store the teacher's vectors with "
            "tools/embed.py and give image_store and text_store"
        )


def _pixels(folder: Path, backbone: nn.Module) -> Pixels:
    own = getattr(backbone.config, "image_size", None)
    pixels = folder_pixels(folder, unsaid=own if isinstance(own, int) else None)
    if pixels is None:
        raise ConfigError(
            f"{folder} lacks a preprocessor_config.json (or processor_config.json) that says how "
            "images are resized and normalised; save the model's image processor into it"
        )
    return pixels


def _digest(folder: Path, tokenizer: PreTrainedTokenizerFast, pixels: Pixels) -> str:
    settings = settings_hash(
        folder_settings(folder, local_files_only=True),
        tokenizer=tokenizer_digest(tokenizer),
        pixels=pixels.text,
    )
    return hashlib.sha256(f"{weights_hash(folder)}\n{settings}".encode()).hexdigest()


def _column(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
