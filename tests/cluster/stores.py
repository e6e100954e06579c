"""Small embedding stores for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trainer.store import EmbeddingStore, Identity, StoreWriter


def identity(dim: int, vectors: int = 1, dtype: Literal["float16", "int8"] = "float16") -> Identity:
    return Identity(
        teacher="test",
        model="0" * 64,
        tokenizer="0" * 64,
        reads="image",
        pooling="mean",
        vectors=vectors,
        dim=dim,
        dtype=dtype,
    )


def write_store(
    folder: Path, rows: Tensor, ids: Tensor, *, sizes: list[int], **kind: Any
) -> EmbeddingStore:
    """A store of [n, d] or [n, vectors, d] rows in shards of the given sizes."""
    blocks = rows[:, None] if rows.ndim == 2 else rows
    names = [f"train-{number:06d}" for number in range(len(sizes))]
    sources = {name: (name, size) for name, size in zip(names, sizes, strict=True)}
    what = identity(blocks.shape[2], blocks.shape[1], **kind)
    writer = StoreWriter.begin(folder, what, sources)
    writer.announce()
    for name, part, part_ids in zip(names, blocks.split(sizes), ids.split(sizes), strict=True):
        writer.write(name, np.asarray(part_ids), part.float())
    writer.finish()
    return EmbeddingStore.open(folder)


def poison(folder: Path, shard: str, value: Tensor) -> None:
    """Overwrite the first vector of a float16 shard, which the writer would refuse."""
    path = folder / f"{shard}.vectors"
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(value.to(torch.float16).numpy().tobytes())
