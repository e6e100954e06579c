"""litdata's reader on the same images, for the bench of readers: `pip install litdata`.

Shards are written once into its own chunks, as its documentation does it: a dictionary a sample,
the image's file as bytes. It is no requirement.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import DataConfig
from trainer.data.fields import find_image
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError

Decode = Callable[[dict[str, Any]], tuple[Tensor, int, int]]


def write_chunks(config: DataConfig, folder: Path) -> None:
    """All samples of the shards, in chunks of 64 MB."""
    shards = ShardSet.open(config.train)
    writer = _module("litdata.streaming.cache").Cache(str(folder), chunk_bytes=64 << 20)
    for index in range(len(shards)):
        raw = shards.read(index)
        image = find_image(raw.fields, config.images)
        writer[index] = {"image": image, "shard": raw.shard, "key": raw.key}
    writer.done()
    writer.merge()


def litdata_batches(folder: Path, decode: Decode, rows: int) -> Iterator[tuple[Tensor, ...]]:
    """Shuffled batches without end; `decode` makes an image, an id and a visit of a sample."""
    litdata = _module("litdata")
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=True, seed=0)
    loader = litdata.StreamingDataLoader(
        dataset,
        batch_size=rows,
        num_workers=0,
        collate_fn=lambda samples: _stacked(decode, samples),
    )
    while True:
        yield from loader


def _stacked(decode: Decode, samples: list[dict[str, Any]]) -> tuple[Tensor, ...]:
    named = [
        {"png": bytes(s["image"]), "__url__": s["shard"], "__key__": s["key"]} for s in samples
    ]
    images, ids, visits = zip(*map(decode, named), strict=True)
    return torch.stack(images), torch.tensor(ids), torch.tensor(visits)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"this needs a package: pip install litdata ({error})") from error
