"""Towers as ONNX graphs, for runtimes without Python.

folder/onnx/           image.onnx: `pixels` [n, 3, s, s] -> `unit_vectors` [n, dim]
                       text.onnx:  `tokens`, `mask` [n, length] (int64) -> `unit_vectors`
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.errors import ConfigError
from trainer.export.native import Exportable
from trainer.models.two_tower import TwoTower

ONNX, OPSET = "onnx", 18
_NEEDED = ("onnx", "onnxscript")


class ImageEmbedding(nn.Module):
    """Pixels to unit vectors."""

    def __init__(self, model: Exportable) -> None:
        super().__init__()
        self.tower: Any = model.image

    def forward(self, pixels: Tensor) -> Tensor:
        rows = self.tower.images(pixels)
        rows = rows.mean(dim=1) if rows.dim() == 3 else rows
        return normalize(rows.float(), dim=1)


class TextEmbedding(nn.Module):
    """Tokens and their mask to unit vectors."""

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.tower = model.text

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return normalize(self.tower.texts(tokens, mask.bool()).float(), dim=1)


def refuse_missing_packages() -> None:
    """ConfigError where torch can't write ONNX."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX needs packages that are not installed: pip install {' '.join(missing)}"
        )


def save_onnx(model: Exportable, folder: Path) -> list[Path]:
    """Write a graph for each tower, for any number of rows; the files."""
    refuse_missing_packages()
    (folder / ONNX).mkdir(parents=True, exist_ok=True)
    size = model.config.image_size
    files = [folder / ONNX / "image.onnx"]
    _write(ImageEmbedding(model), {"pixels": torch.zeros(2, 3, size, size)}, files[0])
    if isinstance(model, TwoTower):
        files.append(folder / ONNX / "text.onnx")
        tokens = torch.ones(2, model.config.text_length, dtype=torch.int64)
        end = model.text.eos_token_id
        tokens[:, -1] = 0 if end is None else end
        _write(TextEmbedding(model), {"tokens": tokens, "mask": torch.ones_like(tokens)}, files[1])
    return files


def _write(tower: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    rows = torch.export.Dim("rows", min=1)
    attention = _plain_attention(tower)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            tower.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["unit_vectors"],
            dynamic_shapes=tuple({0: rows} for _ in inputs),
            verbose=False,
        )
    for backbone, kind in attention:
        backbone.set_attn_implementation(kind)
    assert program is not None
    program.save(path, include_initializers=True)


def _plain_attention(tower: nn.Module) -> list[tuple[Any, str]]:
    """Products and a softmax instead of a fused attention, and what was there before."""
    backbone: Any = tower.get_submodule("tower.backbone")
    before = getattr(backbone.config, "_attn_implementation", None)
    if before in (None, "eager") or not hasattr(backbone, "set_attn_implementation"):
        return []
    backbone.set_attn_implementation("eager")
    return [(backbone, before)]
