"""Training in episodes: which stretch of a run is which, and the features of one's samples."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.long_work import counted
from trainer.recipe import Context, Encode, Samples
from trainer.types import Batch, Progress, TowerName


class Episodes(NamedTuple):
    """The stretches of a run; those at its beginning and end may go without groups."""

    samples: int
    """Of an episode, over all ranks: whole global batches."""
    warmup: int
    """Episodes at the start that have no groups yet."""
    tail_begins: int
    """Number of the first episode of the locked tail."""

    @classmethod
    def of_run(cls, samples: int, context: Context, *, warmup: int, tail: int) -> Episodes:
        """Episodes of at least `samples`, the last `tail` of which are the tail."""
        batch = context.global_batch
        samples = -(-samples // batch) * batch
        count = -(-context.steps * batch // samples)
        return cls(samples, warmup, tail_begins=count - tail)

    def number(self, progress: Progress) -> int:
        """Of the episode that the next step is in, from 0."""
        return progress.samples // self.samples

    def one_begins(self, progress: Progress) -> bool:
        return progress.samples % self.samples == 0

    def in_warmup(self, progress: Progress) -> bool:
        return self.number(progress) < self.warmup

    def in_tail(self, progress: Progress) -> bool:
        return self.number(progress) >= self.tail_begins

    def view(self, progress: Progress, samples: Samples, world_size: int) -> Iterable[Batch]:
        """This rank's share of the episode that begins, in views that it is not trained on."""
        return counted(
            samples.view(progress.samples, self.samples, purpose="extract"),
            "extracting",
            total=-(-self.samples // world_size),
            unit="samples",
            size=lambda batch: len(batch.sample_id),
        )


class Extracted(NamedTuple):
    """This rank's share of an episode."""

    ids: Int64[Tensor, " samples"]
    image: Float[Tensor, "samples dim"]
    text: Float[Tensor, "samples dim"]

    def of(self, modality: TowerName) -> Float[Tensor, "samples dim"]:
        return self.image if modality == "image" else self.text


def extract(encode: Encode, view: Iterable[Batch]) -> Extracted:
    """Projected features of this rank's share of an episode; filling rows are dropped."""
    ids, image, text = [], [], []
    for batch in view:
        features = encode(batch)
        assert features.image_projected is not None
        assert features.text_projected is not None
        real = batch.sample_id >= 0
        ids.append(batch.sample_id[real])
        image.append(features.image_projected[real])
        text.append(features.text_projected[real])
    return Extracted(torch.cat(ids), torch.cat(image), torch.cat(text))


@contextmanager
def timed(figures: dict[str, Any], name: str) -> Iterator[None]:
    """Put the seconds that the inside takes among the figures."""
    start = time.perf_counter()
    yield
    figures[name] = round(time.perf_counter() - start, 3)
