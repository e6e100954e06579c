"""An exported pair of towers as an encoder by the interface of `mteb` (image tasks: MIEB).

import mteb
from trainer.export.mteb_model import MtebModel
mteb.evaluate(MtebModel("runs/mine/export"), tasks=mteb.get_tasks(tasks=["CIFAR10ZeroShot"]))
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from trainer.data.tokenize import tokenize
from trainer.errors import ConfigError
from trainer.export.native import load_exported
from trainer.models.load import model_pixels
from trainer.types import Batch

_IN_PNG = ("RGB", "RGBA", "L", "LA", "P", "1")
_MOST_PIXELS = 200_000_000


class MtebModel:
    """What `mteb` asks of an encoder, by the trainer's own preparation of pixels and texts."""

    def __init__(
        self, folder: str | Path, revision: str | None = None, device: str = "cpu", **_: Any
    ) -> None:
        model, self._tokenizer = load_exported(folder)
        self._model, self._device = model.to(device), device
        self._pixels = model_pixels(model.config)
        self._name, self._revision = f"protoscale/{Path(folder).resolve().name}", revision

    @property
    def mteb_model_meta(self) -> Any:
        """The name under which results are written, and that vectors are compared by cosine."""
        meta = _needed("mteb.models.model_meta")
        said = {
            "name": self._name,
            "revision": self._revision or "unknown",
            "embed_dim": self._model.config.embed_dim,
            "max_tokens": self._model.config.text_length,
            "modalities": ["image", "text"],
            "similarity_fn_name": meta.ScoringFunction.COSINE,
            "framework": ["PyTorch"],
        }
        return meta.ModelMeta.create_empty(overwrites=said)

    def encode(self, inputs: Iterable[Mapping[str, Any]], **_: Any) -> Float[Tensor, "n dim"]:
        """Unit vectors; of rows with an image and a text, those of the two's sum."""
        return torch.cat([self._batch(batch) for batch in inputs])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float[Tensor, "n m"]:
        """Cosines of all pairs."""
        return _rows(embeddings1) @ _rows(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Float[Tensor, " n"]:
        """Cosines of rows that belong together."""
        return (_rows(embeddings1) * _rows(embeddings2)).sum(dim=1)

    @torch.no_grad()
    def _batch(self, batch: Mapping[str, Any]) -> Tensor:
        said = []
        if "image" in batch:
            said.append(self._images(batch["image"]))
        if "text" in batch:
            said.append(self._texts(batch["text"]))
        if not said:
            raise ConfigError(
                f"a pair of towers reads images and texts, and this task has {', '.join(batch)}"
            )
        return normalize(torch.stack(said).sum(dim=0), dim=1)

    def _images(self, images: Sequence[Image.Image]) -> Tensor:
        rows = [self._pixels.decode(_png(image), max_pixels=_MOST_PIXELS) for image in images]
        pixels = self._pixels.normalized(torch.stack(rows).to(self._device))
        features = self._model(Batch(pixels, None, None, torch.arange(len(rows)))).image
        assert features is not None
        return normalize(features.float(), dim=1).cpu()

    def _texts(self, texts: Sequence[str]) -> Tensor:
        length = self._model.config.text_length
        tokens, mask = (
            each.to(self._device) for each in tokenize(self._tokenizer, texts, length=length)
        )
        features = self._model(Batch(None, tokens, mask, torch.arange(len(texts)))).text
        assert features is not None
        return normalize(features.float(), dim=1).cpu()


def _png(image: Image.Image) -> bytes:
    """Losslessly, so that the pixels take the way of a file's: transparency over white."""
    file = io.BytesIO()
    (image if image.mode in _IN_PNG else image.convert("RGB")).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _rows(vectors: Any) -> Tensor:
    return normalize(torch.as_tensor(vectors).float(), dim=-1)


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"this needs a package: pip install mteb ({error})") from error
