"""Captions that a model wrote, beside the shards; the captions in the shards stay as they are.

captions.json        who wrote them, and the digest of every shard's index
ids.npy, starts.npy, texts.bin    UTF-8 texts in order of sample id, looked up by binary search
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from trainer.config import Frozen
from trainer.data.sets import refuse_another_set
from trainer.errors import DataError

FIELD = "generated"
"""The member under which a sample has its generated caption."""
HEADER, IDS, STARTS, TEXTS = "captions.json", "ids.npy", "starts.npy", "texts.bin"


class GeneratedHeader(Frozen):
    """captions.json."""

    format: str = "protoscale-captions-1"
    about: dict[str, object]
    """Who wrote them and how."""
    shards: dict[str, str]
    """Digest of the index of every shard, by name."""
    captions: int


class GeneratedCaptions:
    """A map from sample id to a text; pages of it are read as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.header = folder, read_generated(folder)

    def of(self, sample_id: int) -> str | None:
        """The sample's caption; None where it has none."""
        ids, starts, texts = self._arrays
        place = int(np.searchsorted(ids, sample_id))
        if place == len(ids) or ids[place] != sample_id:
            return None
        return bytes(texts[starts[place] : starts[place + 1]]).decode()

    def added(self, fields: dict[str, bytes], sample_id: int) -> dict[str, bytes]:
        """A sample's members, and its generated caption where it has one."""
        found = self.of(sample_id)
        return fields if found is None else {**fields, FIELD: found.encode()}

    def refuse_other_shards(self, lines: Sequence[str]) -> None:
        """DataError where a shard has the name of another that captions were written for."""
        shards = dict(line.rsplit(" ", 1) for line in lines)
        known = {name: digest for name, digest in shards.items() if digest != "-"}
        refuse_another_set(self.header.shards, known, folder=self.folder)

    @property
    def digest(self) -> str:
        return hashlib.sha256((self.folder / HEADER).read_bytes()).hexdigest()

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
        try:
            ids, starts = (np.load(self.folder / name, mmap_mode="r") for name in (IDS, STARTS))
            empty = int(starts[-1]) == 0
            texts = (
                np.empty(0, np.uint8)
                if empty
                else np.memmap(self.folder / TEXTS, np.uint8, mode="r")
            )
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder} can't be read ({error}); write it again") from None
        if len(starts) != len(ids) + 1 or int(starts[-1]) != len(texts):
            raise DataError(f"{self.folder} is not whole; write it again with tools/caption.py")
        return ids, starts, texts

    def __getstate__(self) -> dict[str, object]:
        """Data workers open the files themselves."""
        return {"folder": self.folder, "header": self.header}


def read_generated(folder: Path) -> GeneratedHeader:
    try:
        return GeneratedHeader.model_validate_json((folder / HEADER).read_bytes())
    except OSError as error:
        raise DataError(
            f"{folder} holds no captions ({error.strerror}); write them with tools/caption.py"
        ) from None
    except ValidationError as error:
        raise DataError(f"{folder / HEADER} is damaged: {error.errors()[0]['msg']}") from None


def write_generated(
    folder: Path, texts: Mapping[int, str], about: dict[str, object], shards: dict[str, str]
) -> None:
    """All captions in order of id, the header last."""
    write_parts(folder, [lambda: texts], about, shards)


def write_parts(
    folder: Path,
    parts: Sequence[Callable[[], Mapping[int, str]]],
    about: dict[str, object],
    shards: dict[str, str],
) -> int:
    """The same of captions that come in parts, each read twice; how many there are.

    In memory are a part and 32 bytes a caption, never the texts of all.
    """
    found = [_lengths(part()) for part in parts]
    ids = np.concatenate([np.empty(0, np.int64), *(each[0] for each in found)])
    lengths = np.concatenate([np.empty(0, np.int64), *(each[1] for each in found)])
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    if len(twice := ids[1:][ids[1:] == ids[:-1]]):
        raise DataError(f"{folder}: two captions are of sample {int(twice[0])}; write them again")
    starts = np.concatenate([[0], np.cumsum(lengths[order])]).astype("<i8")
    np.save(folder / IDS, ids)
    np.save(folder / STARTS, starts)
    with (folder / TEXTS).open("wb") as file:
        file.truncate(int(starts[-1]))
        for part in parts:
            for number, text in sorted(part().items()):
                file.seek(int(starts[np.searchsorted(ids, number)]))
                file.write(text.encode())
    header = GeneratedHeader(about=about, shards=shards, captions=len(ids))
    (folder / f"{HEADER}.partial").write_text(header.model_dump_json(indent=1))
    (folder / f"{HEADER}.partial").replace(folder / HEADER)
    return len(ids)


def _lengths(texts: Mapping[int, str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(ids, bytes of their texts)."""
    sizes = [len(text.encode()) for text in texts.values()]
    return np.array(list(texts), np.int64), np.array(sizes, np.int64)
