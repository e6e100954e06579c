"""Sets of shards that are used together: their names, and whether they are those of before."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from trainer.data.index import shard_stem
from trainer.errors import DataError

SOURCES = "sources.json"
"""In a folder of labels: the names and digests of the shards that they were made of."""


def named_shard(set_name: str, path: str) -> str:
    """A shard's name without folders, behind its set's where it has one: `cc3m=00000`."""
    stem = shard_stem(path)
    return f"{set_name}={stem}" if set_name else stem


def names_by_folder(paths: Sequence[str]) -> list[str] | None:
    """A name for each path's folder: what tells it from the others, `cc3m` of `/data/cc3m/train`
    beside `/data/cc12m/train`. None where that makes no different names."""
    folders = [tuple(str(PurePosixPath(path.split("?")[0]).parent).split("/")) for path in paths]
    different = list(dict.fromkeys(folders))
    before = _common(different)
    behind = _common([tuple(reversed(folder[before:])) for folder in different])
    names = {folder: _plain(folder[before : len(folder) - behind]) for folder in different}
    if len(set(names.values())) < len(names) or not all(names.values()):
        return None
    return [names[folder] for folder in folders]


def refuse_other_shards(before: Sequence[str], now: Sequence[str]) -> None:
    """DataError that says what differs, where two lists of names and digests are not the same in
    any order."""
    if sorted(before) == sorted(now):
        return
    old, new = (dict(line.rsplit(" ", 1) for line in lines) for lines in (before, now))
    changed = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    gone, added = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    found = [
        f"{len(names)} {what}, as {names[0]}"
        for names, what in ((changed, "changed"), (gone, "are missing"), (added, "are new"))
        if names
    ]
    raise DataError(
        f"the shards are not the {len(before)} that the run began with: "
        f"{'; '.join(found) or 'some come more often'}; bring those back, wherever they lie, or "
        "choose another workdir"
    )


def refuse_another_set(
    made_of: Mapping[str, str], shards: Mapping[str, str], *, folder: Path
) -> None:
    """DataError where shards have the names of others that something in `folder` was made of.

    Both by name, with the digests of their indexes. Samples are found by the names of set, shard
    and key, so those of another download with the same names would be taken for them.
    """
    other = [name for name, digest in shards.items() if made_of.get(name, digest) != digest]
    if other:
        raise DataError(
            f"{folder} was made of another {other[0]} than the run's ({len(other)} of "
            f"{len(shards)} shards have the name of one there and other contents); make it anew of "
            "these shards, or name the set (data.train: {name: shards}) as it was named there"
        )


def _common(rows: Sequence[tuple[str, ...]]) -> int:
    """How many parts all begin with."""
    shortest = min(map(len, rows))
    return next((n for n in range(shortest) if len({row[n] for row in rows}) > 1), shortest)


def _plain(parts: Sequence[str]) -> str:
    return re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-._")[:64]
