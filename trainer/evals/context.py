"""What an evaluation may use besides its own configuration and the model's forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import DataConfig


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
    encoded: dict[tuple[str, int | None], Any] | None = None
    """Encoded splits by (shards, limit), so that several evaluations of one model share them."""
