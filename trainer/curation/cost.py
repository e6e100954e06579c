"""What one pass over a corpus costs: time, bytes read and written, and memory of a process."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainer.curation.repeats import ROWS_AT_ONCE
from trainer.curation.scan import CHUNK

ROW_BYTES = 8 + 1 + 2 + 4 + 4 + 8 + 8 + 8 + 2 + 1 + 8
"""Of a sample in its rows' file, without its concepts and tags."""
_HASH_BYTES = 16


class Corpus(NamedTuple):
    """How much there is, and how fast one process is."""

    samples: int = 407_332_084
    """Of LAION-400M as published runs counted an epoch."""
    shard_samples: int = 10_000
    sample_bytes: int = 25_000
    """Of a sample in its shard."""
    hits: float = 1.0
    """Concepts in a caption."""
    dim: int = 512
    image_size: int = 224
    processes: int = 1
    samples_per_second: float = 100.0
    """Of one process, decoding included; measure it on a few shards."""
    stores: int = 1
    """2 where the captions' vectors are kept as well."""


def cost(corpus: Corpus) -> list[dict[str, Any]]:
    """A row a figure, with how it was found."""
    seconds = corpus.samples / (corpus.samples_per_second * corpus.processes)
    shards = -(-corpus.samples // corpus.shard_samples)
    vectors = corpus.samples * (2 * corpus.dim + 8) * corpus.stores
    rows = corpus.samples * (ROW_BYTES + 4 * corpus.hits)
    pictures = CHUNK * 3 * (corpus.image_size**2 + 32 * 32)
    shard = corpus.shard_samples * (4 * corpus.dim * 2 + 512)
    parts = -(-corpus.samples // ROWS_AT_ONCE)
    return [
        {"figure": "samples", "value": f"{corpus.samples:,}"},
        {"figure": "shards, each a task of its own", "value": f"{shards:,}"},
        {"figure": "read once", "value": f"{corpus.samples * corpus.sample_bytes / 1e12:.1f} TB"},
        {"figure": "vectors written", "value": f"{vectors / 1e9:,.0f} GB"},
        {"figure": "rows written", "value": f"{rows / 1e9:,.0f} GB"},
        {
            "figure": f"time on {corpus.processes} processes of "
            f"{corpus.samples_per_second:g} samples a second",
            "value": f"{seconds / 3600:,.1f} h",
        },
        {
            "figure": "memory of a process beside the model",
            "value": f"{(pictures + shard) / 2**20:,.0f} MiB",
        },
        {
            "figure": "for near-duplicates: parts, memory of a process",
            "value": f"{parts}, {min(corpus.samples, ROWS_AT_ONCE) * _HASH_BYTES * 3 / 2**30:.1f} "
            "GiB",
        },
    ]
