"""Shards of tiny real images, and streams over them."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests.data.tars import Samples, write_tar
from trainer.comm import Comm
from trainer.config import AugmentConfig, DataConfig, ViewsConfig
from trainer.data.feed import ONE_VIEW
from trainer.data.index import write_index
from trainer.data.stream import Stream
from trainer.data.tokenize import train_tokenizer
from trainer.types import Batch

SIDE = 8
PLAIN = AugmentConfig(flip=0.5, jitter_probability=0.0, gray_probability=0.0, blur_probability=0.0)


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([f"sample {n}" for n in range(100)], vocab_size=300, length=8)


@lru_cache(maxsize=1024)
def png(number: int) -> bytes:
    image = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
    image.putpixel((0, 0), (number % 256, number // 256, 0))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def image_samples(count: int, *, first: int = 0) -> Samples:
    numbers = range(first, first + count)
    return {f"{n:05d}": {"png": png(n), "txt": f"sample {n}".encode()} for n in numbers}


def write_shards(folder: Path, sizes: list[int]) -> str:
    """One indexed shard per size; the spec of all of them."""
    first = 0
    for number, size in enumerate(sizes):
        samples = image_samples(size, first=first)
        write_index(write_tar(folder / f"{number:03d}.tar", samples))
        first += size
    return f"{folder}/{{000..{len(sizes) - 1:03d}}}.tar"


def open_stream(
    spec: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    global_batch: int = 8,
    micro_batch: int | None = None,
    seed: int = 0,
    workdir: Path | None = None,
    views: ViewsConfig = ONE_VIEW,
    image_size: int = SIDE,
    before: list[str] | None = None,
    **config: Any,
) -> Stream:
    window = {} if config.get("reader") == "webdataset" else {"window_shards": 3}
    return Stream(
        DataConfig(**{"train": spec, "augment": PLAIN, **window, **config}),
        Comm(rank=rank, world_size=world_size, device=torch.device("cpu")),
        tokenizer=tokenizer(),
        image_size=image_size,
        text_length=8,
        seed=seed,
        global_batch=global_batch,
        micro_batch=micro_batch or global_batch // world_size,
        workdir=workdir,
        views=views,
        before=before,
    )


def same(first: list[Batch], second: list[Batch]) -> bool:
    """Equal in every bit."""
    return len(first) == len(second) and all(
        (a is None and b is None) or torch.equal(a, b)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x, y, strict=True)
    )
