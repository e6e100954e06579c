"""Writes splits as indexed shards, and the manifest that says all of it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.corpus.pairs import LICENCES, Pair
from trainer.data.corpus.wheels import sha256_of
from trainer.data.index import index_path, write_index

MANIFEST = "manifest.json"
PAIRS_PER_SHARD = 1000
_LONGEST_KEY = 90


class Classes(NamedTuple):
    """Names in the order of their ids. Concepts are [key, name]; emoji come before icons."""

    concept: list[list[str]]
    subgroup: list[str]
    group: list[str]


def class_tables(pairs: Iterable[Pair]) -> Classes:
    """Ids that depend on the set of names alone, not on the order of the pairs."""
    concepts, subgroups, groups = {}, set(), set()
    for pair in pairs:
        concepts[pair.concept] = pair.facts["concept"]
        if pair.facts["subgroup"] is not None:
            subgroups.add(pair.facts["subgroup"])
            groups.add(pair.facts["group"])
    return Classes(
        [[key, concepts[key]] for key in sorted(concepts)], sorted(subgroups), sorted(groups)
    )


class Numbering:
    """Class ids of a pair; -1 where it has no such class."""

    def __init__(self, classes: Classes):
        self._concepts = {key: at for at, (key, _) in enumerate(classes.concept)}
        self._subgroups = {name: at for at, name in enumerate(classes.subgroup)}
        self._groups = {name: at for at, name in enumerate(classes.group)}

    def ids(self, pair: Pair) -> dict[str, int]:
        return {
            "class_id": self._concepts[pair.concept],
            "subgroup_id": self._subgroups.get(pair.facts["subgroup"], -1),
            "group_id": self._groups.get(pair.facts["group"], -1),
        }


def sample_key(pair: Pair) -> str:
    """The pair's name in its shard: `google_1f34e`, `mdi_outline-apple`.

    A tar's header has room for so many letters; of longer names a hash stands for the end.
    """
    name = re.sub("[^0-9A-Za-z_-]", "_", f"{pair.vendor}_{pair.key}")
    if len(name) <= _LONGEST_KEY:
        return name
    digest = hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
    return f"{name[: _LONGEST_KEY - len(digest) - 1]}-{digest}"


def sample_fields(pair: Pair, numbering: Numbering) -> dict[str, bytes]:
    """What stands in the shard: png, txt, json, cls."""
    ids = numbering.ids(pair)
    record = {**pair.facts, **ids, "pix": pair.pixels}
    return {
        "png": pair.png,
        "txt": pair.caption.encode(),
        "json": json.dumps(record, ensure_ascii=False).encode(),
        "cls": str(ids["class_id"]).encode(),
    }


def write_shard(path: Path, pairs: Sequence[Pair], numbering: Numbering) -> dict[str, Any]:
    """Writes one shard and its index; the same pairs give the same bytes. Returns its facts."""
    keys = [sample_key(pair) for pair in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"{path.name} would hold one key twice: {Counter(keys).most_common(1)}")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for key, pair in zip(keys, pairs, strict=True):
            for extension, data in sample_fields(pair, numbering).items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    indexed = write_index(str(path))
    if indexed != len(pairs):
        raise ValueError(f"{path.name} has {len(pairs)} pairs, but its index found {indexed}")
    index = Path(index_path(str(path)))
    return {
        "pairs": len(pairs),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "index_sha256": sha256_of(index),
    }


def shard_names(split: str, num_shards: int) -> list[str]:
    return [f"{split}-{number:06d}.tar" for number in range(num_shards)]


def shard_spec(split: str, num_shards: int) -> str:
    """The brace list of a split's shards; a glob would take `train-icon` for `train`."""
    if num_shards == 1:
        return f"{split}-000000.tar"
    return f"{split}-{{000000..{num_shards - 1:06d}}}.tar"


def write_split(
    folder: Path, split: str, pairs: Sequence[Pair], *, numbering: Numbering, per_shard: int
) -> dict[str, dict[str, Any]]:
    """Writes a split as shards of equal size, give or take one pair; facts by file name."""
    num_shards = max(1, -(-len(pairs) // per_shard))
    edges = [len(pairs) * number // num_shards for number in range(num_shards + 1)]
    return {
        name: {"split": split} | write_shard(folder / name, pairs[start:stop], numbering)
        for name, start, stop in zip(
            shard_names(split, num_shards), edges[:-1], edges[1:], strict=True
        )
    }


def write_corpus(
    folder: Path,
    splits: Mapping[str, Sequence[Pair]],
    *,
    header: Mapping[str, Any],
    per_shard: int,
) -> dict[str, Any]:
    """Writes all shards, then the manifest, which starts with `header`. Returns the manifest."""
    pairs = [pair for split in splits.values() for pair in split]
    classes = class_tables(pairs)
    numbering = Numbering(classes)
    shards: dict[str, dict[str, Any]] = {}
    for split, members in splits.items():
        shards |= write_split(folder, split, members, numbering=numbering, per_shard=per_shard)
    manifest = {
        **header,
        "pairs": len(pairs),
        "splits": {
            split: _split_facts(split, members, shards) for split, members in splits.items()
        },
        "vendors": _vendor_facts(pairs),
        "shards": shards,
        "classes": classes._asdict(),
    }
    (folder / MANIFEST).write_text(_readable(manifest), "utf-8")
    return manifest


def _split_facts(
    split: str, pairs: Sequence[Pair], shards: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    own = [facts for facts in shards.values() if facts["split"] == split]
    return {
        "spec": shard_spec(split, len(own)),
        "pairs": len(pairs),
        "concepts": len({pair.concept for pair in pairs}),
        "pictures": len({pair.pixels for pair in pairs}),
        "bytes": sum(facts["bytes"] for facts in own),
        "vendors": dict(sorted(Counter(pair.vendor for pair in pairs).items())),
        "tones": sum(pair.toned for pair in pairs),
        "glosses": sum(pair.facts["gloss"] is not None for pair in pairs),
    }


def _vendor_facts(pairs: Iterable[Pair]) -> dict[str, dict[str, Any]]:
    counts = Counter(pair.vendor for pair in pairs)
    return {name: {"pairs": counts[name], "licence": LICENCES[name]} for name in sorted(counts)}


def _readable(manifest: Mapping[str, Any]) -> str:
    """JSON with one line per split, shard and class, so that a person can read and compare it."""
    lines = []
    for key, value in manifest.items():
        lines.append(f"{json.dumps(key)}: {_block(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _block(value: Any, depth: int = 0) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(flat) < 90 or depth == 2:
        return flat
    indent = " " * (depth + 1)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_block(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(indent + item for item in items) + "\n" + indent[1:] + "}"
    items = [_block(item, depth + 1) for item in value]
    return "[\n" + ",\n".join(indent + item for item in items) + "\n" + indent[1:] + "]"
