"""How large a store will be, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.store.header import Identity

CORPORA: Mapping[str, int] = {"CC3M": 2_905_954, "LAION-400M": 413_871_335}
"""Samples of public image-text collections."""
_OVERHEAD_BYTES = 4096  # header of a file
_SHARD_SAMPLES = 10_000


def plan_rows(
    identity: Identity, corpora: Mapping[str, int] = CORPORA, *, component_dims: int = 256
) -> list[dict[str, Any]]:
    """Bytes per sample and gigabytes (10^9) of each corpus, by how the vectors are stored.

    Headers of files with 10,000 samples each are counted in.
    """
    dims = [identity.dim] + [component_dims] * (component_dims < identity.dim)
    rows = []
    for dim in dims:
        for dtype in ("float16", "int8"):
            stored = identity.model_copy(update={"dim": dim, "dtype": dtype})
            totals = {
                f"{name}_GB": store_bytes(stored, count) / 1e9 for name, count in corpora.items()
            }
            row = {"vectors": stored.vectors, "dim": dim, "dtype": dtype}
            rows.append({**row, "bytes_per_sample": stored.row_bytes, **totals})
    return rows


def store_bytes(identity: Identity, samples: int) -> int:
    """Of all files of a store with `samples` rows."""
    return samples * identity.row_bytes + -(-samples // _SHARD_SAMPLES) * _OVERHEAD_BYTES
