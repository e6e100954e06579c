"""What an evaluation may use besides its own configuration and the model's forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import DataConfig
from trainer.data.pixels import Pixels
from trainer.data.prepare import InsteadOfImages
from trainer.evals.samples import Record
from trainer.stop import Check, go_on
from trainer.store import EmbeddingStore


class EvalContext(NamedTuple):
    """Shared by all evaluations of a run; the same on every rank but for `comm`."""

    comm: Comm
    tokenizer: PreTrainedTokenizerFast | None
    """None for a model that reads no text: knn and linear_probe need none."""
    image_size: int
    text_length: int
    data: DataConfig
    """How images are decoded; its training shards are the bank of zero_shot's pixel floor."""
    seed: int
    """Draws the probe's validation part."""
    pixels: Pixels | None = None
    """How images become the model's input; as for CLIP where None."""
    stored: InsteadOfImages | None = None
    """What the model reads in place of images, if it does."""
    encoded: dict[tuple[str, int | None], Any] | None = None
    """Encoded splits by (shards, limit), so that several evaluations of one model share them."""
    check: Check = go_on
    """For what takes long and calls no `Encode`; all ranks must call it equally often."""


class Wanted(NamedTuple):
    """Something that a sample of some shards at least must have, or an evaluation can't work."""

    spec: str
    what: str
    """In words, with the key to set: `a class under 'label' (set target)`."""
    found: Callable[[Record], bool]


def holder(folder: Path) -> Callable[[int], bool]:
    """Whether a store has vectors of an id; 8 bytes a vector from the first question on."""

    @cache
    def sorted_ids() -> NDArray[np.int64]:
        return np.sort(EmbeddingStore.open(folder).ids)

    def holds(sample_id: int) -> bool:
        ids = sorted_ids()
        place = int(np.searchsorted(ids, sample_id))
        return place < len(ids) and int(ids[place]) == sample_id

    return holds
