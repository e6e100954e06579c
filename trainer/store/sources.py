"""Which shards a folder of vectors or of labels was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from trainer.data.sets import SOURCES
from trainer.errors import DataError
from trainer.store.header import HEADER, StoreHeader, read_header, write_whole


def made_of(folder: Path) -> dict[str, str]:
    """Name and digest of every shard; empty where the folder does not say, or is none."""
    if not folder.is_dir():
        return {}
    header = read_header(folder / HEADER)
    if header is not None:
        return {name: entry.source for name, entry in header.shards.items()}
    try:
        found = dict(json.loads((folder / SOURCES).read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / SOURCES} can't be read: {error}; make it anew") from None
    return {str(name): str(digest) for name, digest in found.items()}


def write_sources(folder: Path, header: StoreHeader) -> None:
    """Say in a folder of labels which shards the vectors were made of that they came from."""
    sources: Mapping[str, str] = {name: entry.source for name, entry in header.shards.items()}
    write_whole(folder / SOURCES, json.dumps(sources, indent=1).encode())
