"""What the vectors of a store are. Two stores whose identities differ are never mixed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from trainer.config import Frozen, PositiveInt
from trainer.errors import DataError

HEADER, BUILDING = "header.json", "building.json"

_SHOWN_CHARACTERS = 60

ShardName = Annotated[str, Field(pattern=r"^[^/\\.\x00][^/\\\x00]*$", max_length=200)]
"""A plain file name: a header can't point out of its folder."""


class Identity(Frozen):
    """What the vectors are: everything that decides their values, apart from the samples."""

    teacher: str
    """A name for people."""
    model: str
    """SHA-256 of the weights."""
    tokenizer: str
    """SHA-256 of the tokenizer; for images, how pixels were prepared."""
    reads: str
    """Which fields of a sample are read."""
    prompts: str = "plain"
    """Name and SHA-256 of the prompt set: templates and facets."""
    pooling: str
    """How the states of a text or an image became a vector."""
    mask: str = "padding"
    """Which keys a token sees besides the rule of its model."""
    layer: int = -1
    """Blocks that were run; -1 is all of them and the final norm."""
    compute: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the forward pass."""
    vectors: PositiveInt = 1
    """Vectors per sample."""
    dim: PositiveInt
    dtype: Literal["float16", "int8"] = "float16"
    """int8 has a float32 scale per vector."""
    projection: str = "none"
    """SHA-256 of pca.safetensors."""
    settings: str = "not recorded"
    """SHA-256 of what model, tokenizer and preprocessing were set to, as they were loaded."""

    @property
    def vector_bytes(self) -> int:
        return 2 * self.dim if self.dtype == "float16" else self.dim

    @property
    def row_bytes(self) -> int:
        """Bytes of a sample on disk, its id and scales included."""
        scales = 4 * self.vectors if self.dtype == "int8" else 0
        return self.vectors * self.vector_bytes + scales + 8


class ShardEntry(Frozen):
    """One shard of the store."""

    source: str
    """Digest of the index of the data shard that was read."""
    samples: int = Field(default=0, ge=0)
    """Of the data shard; those that could not be read have no row."""
    rows: int | None = Field(default=None, ge=0)
    """None until all shards are there."""


class StoreHeader(Frozen):
    """header.json and building.json."""

    format: Literal["protoscale-embeddings-2"] = "protoscale-embeddings-2"
    identity: Identity
    count: int | None = Field(default=None, ge=0)
    """Rows of all shards."""
    shards: dict[ShardName, ShardEntry]


def read_header(path: Path) -> StoreHeader | None:
    """None where there is no such file; DataError where it is not a store's header."""
    try:
        return StoreHeader.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise DataError(f"{path} is no header of a store: {place} {problem['msg']}") from None


def refuse_others(place: Path, before: Identity, identity: Identity) -> None:
    """DataError that names the first key in which two identities differ."""
    old, new = before.model_dump(), identity.model_dump()
    for key in new:
        if old[key] != new[key]:
            raise DataError(
                f"{place} holds vectors with {key} {_short(old[key])}, not {_short(new[key])}; "
                "give another folder, or delete it"
            )


def refuse_changed(folder: Path, name: str, before: str, source: str) -> None:
    """DataError where the data of a shard are not those that were read."""
    if before != source:
        raise DataError(
            f"shard {name} has changed since its vectors in {folder} were computed; "
            "give another folder, or delete it"
        )


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """All of the file or nothing of it, whenever the process dies."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 4] + " ..."
