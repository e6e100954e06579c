"""Texts that belong to no sample, such as prompts of class names, given to a teacher as samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from trainer.data.shards import RawSample
from trainer.hashing import key_of

TEXTS_PER_SHARD = 4096


def text_id(text: str) -> int:
    """The 63-bit id under which a text's vectors are stored: a hash of the text."""
    return key_of("text", text) & ((1 << 63) - 1)


class TextSet:
    """Different texts in a fixed order, some thousands to a shard; `txt` is all they have."""

    def __init__(self, texts: Iterable[str], *, per_shard: int = TEXTS_PER_SHARD) -> None:
        self.texts = list(dict.fromkeys(texts))
        self.per_shard = per_shard
        starts = range(0, len(self.texts), per_shard)
        self.shards = tuple(f"texts-{number:06d}" for number in range(len(starts)))
        self.sizes = tuple(min(per_shard, len(self.texts) - start) for start in starts)

    def __len__(self) -> int:
        return len(self.texts)

    def name_of(self, index: int) -> tuple[str, str, int]:
        """(shard, key, id) of text `index`."""
        shard = self.shards[index // self.per_shard]
        return shard, str(index), text_id(self.texts[index])

    def read(self, index: int) -> RawSample:
        shard, key, number = self.name_of(index)
        return RawSample(number, shard, key, {"txt": self.texts[index].encode()})

    def digest(self, row: int) -> str:
        """SHA-256 of a shard's texts."""
        start = row * self.per_shard
        texts = self.texts[start : start + self.per_shard]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()
