"""Tensors of a safetensors file, or one sentence."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import DataError


def read_tensors(path: Path, *, of: str) -> dict[str, Tensor]:
    """All tensors of a file; DataError, with what they are `of`, where it is none or is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} does not hold {of}: {error}; bring it back or make it anew") from (
            error
        )
