"""What a scan has seen of each sample, and its columns of a shard's file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from trainer.concepts.matcher import Hits
from trainer.curation.languages import Languages
from trainer.curation.rows import NO_LANGUAGE, USABLE, Rows, starts_of

_MOST_WORDS = np.iinfo(np.int16).max


class Looked(NamedTuple):
    """One sample before its vectors are computed; None where there is no picture or caption."""

    sample_id: int
    status: int
    reason: str
    key: str
    pixels: Tensor | None = None
    caption: str | None = None
    columns: tuple[int, ...] = (0, 0, 0, 0)
    """Width, height, perceptual hash, hash of the bytes."""
    hits: tuple[Hits | None, ...] = ()


def rows_of(
    looked: Sequence[Looked],
    scores: np.ndarray,
    tags: Sequence[Sequence[int]],
    languages: Languages,
) -> Rows:
    """The columns of a shard. `scores` and `tags` are of the usable samples, in their order."""
    status = np.array([each.status for each in looked], np.uint8)
    score = np.full(len(looked), np.nan, np.float16)
    score[status == USABLE] = scores.astype(np.float16)
    columns = np.array([each.columns for each in looked], np.int64).reshape(-1, 4)
    captions = [each.caption for each in looked]
    seen = iter(tags)
    hit_starts, hits = starts_of([_named(each.hits) for each in looked])
    tag_starts, shown = starts_of([next(seen) if each == USABLE else [] for each in status])
    find = languages.of
    return Rows(
        ids=np.array([each.sample_id for each in looked], np.int64),
        status=status,
        score=score,
        width=columns[:, 0].astype(np.int32),
        height=columns[:, 1].astype(np.int32),
        picture=columns[:, 2],
        content=columns[:, 3],
        caption=np.array([0 if c is None else short_hash(c.encode()) for c in captions], np.int64),
        words=np.array([min(len((c or "").split()), _MOST_WORDS) for c in captions], np.int16),
        language=np.array([NO_LANGUAGE if c is None else find(c) for c in captions], np.uint8),
        hit_starts=hit_starts,
        hits=hits,
        tag_starts=tag_starts,
        tags=shown,
    )


def short_hash(data: bytes) -> int:
    """The first 8 bytes of a content's BLAKE2b, as a signed number."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _named(hits: Sequence[Hits | None]) -> list[int]:
    """Concepts that any language's caption has as a phrase."""
    return sorted({number for found in hits if found is not None for number in found.phrase})
