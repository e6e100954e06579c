"""Samples per second and core: the indexed reader beside webdataset's own pipeline.

Both decode, crop and augment by the same functions, without captions, in one process and one
thread, on the same shards. Rounds alternate and each side's best round counts: by the clock and,
for machines that are busy with other things, by seconds of this process's CPU time.
"""

from __future__ import annotations

import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
import webdataset
from torch import Tensor

from trainer.bench.litdata_peer import litdata_batches, write_chunks
from trainer.bench.options import SHARDS
from trainer.comm import Comm
from trainer.config import DataConfig
from trainer.data.decode import decode_image
from trainer.data.fields import find_image
from trainer.data.remote import expand_shards
from trainer.data.shards import sample_id
from trainer.data.stream import Stream
from trainer.data.views import View, augment, draw_view, random_crop

BATCH = 64
ROUNDS = 4


def add_options(command: ArgumentParser) -> None:
    command.add_argument("--data", default=SHARDS, help="shards")
    command.add_argument("--seconds", type=float, default=40.0, help="of measuring, both sides")
    command.add_argument("--size", type=int, default=64, help="pixels per side")
    command.add_argument("--litdata", action="store_true", help="and litdata's, if installed")


def measure_options(options: Namespace) -> list[dict[str, Any]]:
    return run(options.data, seconds=options.seconds, size=options.size, litdata=options.litdata)


def run(shards: str, *, seconds: float, size: int, litdata: bool = False) -> list[dict[str, Any]]:
    """One row per reader: samples/s on one core, and the ratio to webdataset's loader.

    `seconds` is the measuring time over all sides and rounds; `size` the image's side.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = DataConfig(train=shards)
        sides = {"indexed": _indexed(config, size), "webdataset": _webdataset(config, size)}
        with tempfile.TemporaryDirectory() as folder:
            if litdata:
                sides["litdata"] = _litdata(config, size, Path(folder))
            best = _best_of_rounds(sides, seconds / (len(sides) * ROUNDS))
    finally:
        torch.set_num_threads(threads)
    theirs = best["webdataset"]
    return [
        {
            "bench": "data",
            "reader": name,
            "size": size,
            "samples_per_second_per_core": round(rate.clock, 1),
            "ratio_to_webdataset": round(rate.clock / theirs.clock, 3),
            "cpu_samples_per_second": round(rate.cpu, 1),
            "cpu_ratio_to_webdataset": round(rate.cpu / theirs.cpu, 3),
        }
        for name, rate in best.items()
    ]


class Rate(NamedTuple):
    """Samples per second by the clock, and per second of CPU time."""

    clock: float
    cpu: float


def _best_of_rounds(sides: dict[str, Iterator[Tensor]], seconds: float) -> dict[str, Rate]:
    for side in sides.values():
        next(side)  # files are opened and caches filled before the clock starts
    best = dict.fromkeys(sides, Rate(0.0, 0.0))
    for turn in range(ROUNDS):
        # Whoever goes first in one round goes last in the next.
        for name in sorted(sides, reverse=bool(turn % 2)):
            best[name] = Rate(*map(max, best[name], _rate(sides[name], seconds)))
    return best


def _rate(batches: Iterator[Tensor], seconds: float) -> Rate:
    began, cpu_began, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        done += len(next(batches))
    return Rate(done / (time.perf_counter() - began), done / (time.process_time() - cpu_began))


def _indexed(config: DataConfig, size: int) -> Iterator[Tensor]:
    stream = Stream(
        config,
        Comm.solo(),
        tokenizer=None,
        image_size=size,
        text_length=1,
        seed=0,
        global_batch=BATCH,
        micro_batch=BATCH,
        workdir=None,
    )
    while True:
        (batch,) = stream.take()
        assert batch.images is not None
        yield batch.images


def _webdataset(config: DataConfig, size: int) -> Iterator[Tensor]:
    """Resampled, shuffled and batched as webdataset's documentation does it for training."""
    dataset = webdataset.WebDataset(
        expand_shards(config.train), resampled=True, shardshuffle=False, seed=0
    ).shuffle(1000, initial=1000)  # full before the clock starts: filling it reads twice as much
    # A new number for every visit, so that both sides draw equally many blurs and jitters.
    decode = partial(_decoded, visits=count(), config=config, size=size)
    loader = webdataset.WebLoader(
        dataset.map(decode).batched(BATCH, _stacked), batch_size=None, num_workers=0
    )
    for images, ids, epochs in loader:
        draws = draw_view(ids, epochs, seed=0, purpose="train")
        yield augment(images, draws, config=config.augment)


def _litdata(config: DataConfig, size: int, folder: Path) -> Iterator[Tensor]:
    """Shuffled as its documentation does it; its samples are decoded as webdataset's are."""
    write_chunks(config, folder)
    decode = partial(_decoded, visits=count(), config=config, size=size)
    for images, ids, epochs in litdata_batches(folder, decode, BATCH):
        draws = draw_view(ids, epochs, seed=0, purpose="train")
        yield augment(images, draws, config=config.augment)


def _decoded(
    sample: dict[str, Any], *, visits: Iterator[int], config: DataConfig, size: int
) -> tuple[Tensor, int, int]:
    number, visit = sample_id(sample["__url__"], sample["__key__"]), next(visits)
    view = View(0, visit, "train", config.augment)
    fields = {name: data for name, data in sample.items() if isinstance(data, bytes)}
    image = decode_image(
        find_image(fields, config.images),
        size=size,
        background=config.background,
        max_pixels=config.max_pixels,
        crop=partial(random_crop, sample_id=number, view=view),
    )
    return image, number, visit


def _stacked(samples: list[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    images, ids, visits = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(ids), torch.tensor(visits)
