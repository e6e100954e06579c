"""What a scan knows of the samples of one shard: a column a question, a file a shard.

A file appears whole, by one rename, and says which shard and which questions it answers. Row n is
sample n of the shard's index.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int16, Int32, Int64, UInt8
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trainer.errors import DataError
from trainer.store.header import write_whole

FORMAT = "protoscale-scan-1"
SUFFIX = ".safetensors"
USABLE, NO_IMAGE, NO_CAPTION, DAMAGED = range(4)
REASONS = ("usable", "no image", "no caption", "damaged")
NO_LANGUAGE = 0


@dataclass(frozen=True)
class Rows:
    """Of every sample of a shard; what is unknown of an unusable one is zero, its score NaN."""

    ids: Int64[np.ndarray, " n"]
    status: UInt8[np.ndarray, " n"]
    """A place in `REASONS`."""
    score: Float16[np.ndarray, " n"]
    """Cosine between image and caption."""
    width: Int32[np.ndarray, " n"]
    """Pixels, as stored."""
    height: Int32[np.ndarray, " n"]
    picture: Int64[np.ndarray, " n"]
    """Perceptual hash."""
    content: Int64[np.ndarray, " n"]
    """BLAKE2b of the image's bytes, 8 of them."""
    caption: Int64[np.ndarray, " n"]
    """BLAKE2b of the caption's bytes."""
    words: Int16[np.ndarray, " n"]
    """Of the caption, divided by white space."""
    language: UInt8[np.ndarray, " n"]
    """A place in the header's list, whose first entry is none."""
    hit_starts: Int32[np.ndarray, " ends"]
    """Where each row's concepts begin in `hits`, and the end."""
    hits: Int32[np.ndarray, " hits"]
    """Numbers of concepts in the bank."""
    tag_starts: Int32[np.ndarray, " ends"]
    tags: Int32[np.ndarray, " tags"]
    """Concepts that the image shows, by the model's own prompts."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def usable(self) -> NDArray[np.bool_]:
        return np.asarray(self.status == USABLE)

    def concepts(self, row: int) -> NDArray[np.int32]:
        return np.asarray(self.hits[self.hit_starts[row] : self.hit_starts[row + 1]])


_COLUMNS = tuple(column.name for column in fields(Rows))


@dataclass(frozen=True)
class RowsHeader:
    """What a file of rows says of itself."""

    source: str
    """Digest of the shard's index."""
    asked: str
    """SHA-256 of everything that decides the columns besides the shard."""
    languages: tuple[str, ...]
    """By number; the first is none."""


def save_rows(path: Path, rows: Rows, header: RowsHeader) -> None:
    """All of the file or nothing; equal rows are equal bytes."""
    about = json.dumps(
        {
            "format": FORMAT,
            "source": header.source,
            "asked": header.asked,
            "languages": header.languages,
        }
    )
    arrays = {name: np.ascontiguousarray(getattr(rows, name)) for name in _COLUMNS}
    write_whole(path, save(arrays, metadata={"about": about}))


def open_rows(path: Path, names: Sequence[str] = _COLUMNS) -> tuple[Rows, RowsHeader]:
    """Some columns (the others are empty) and the header; DataError where there is no such file."""
    empty = np.empty(0, np.int64)
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            found = {n: file.get_tensor(n) if n in names else empty for n in _COLUMNS}
    except FileNotFoundError:
        raise DataError(f"no scan at {path}; make one with tools/scan.py") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is no file of a scan ({error}); delete it") from None
    if about.get("format") != FORMAT:
        raise DataError(f"{path} is no file of the form {FORMAT}; scan into another folder")
    header = RowsHeader(about["source"], about["asked"], tuple(about["languages"]))
    return Rows(**found), header


def is_done(path: Path, source: str, asked: str) -> bool:
    """Whether a shard's rows are there; DataError where they are of other data or questions."""
    if not path.exists():
        return False
    header = open_rows(path, ("ids",))[1]
    if header.source != source:
        raise DataError(
            f"{path} is of a shard that has changed since; give another folder, or delete it"
        )
    if header.asked != asked:
        raise DataError(
            f"{path} was scanned with another model, bank or settings; give another folder, or "
            "delete it"
        )
    return True


def starts_of(lists: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Lists as one array, and where each of them begins."""
    starts = np.cumsum([0, *map(len, lists)]).astype(np.int32)
    return starts, np.array([number for each in lists for number in each], np.int32)
