"""Count a bank's concepts in the captions of shards: a file a shard, then their sum.

A shard is done when its file is there and says that it is of this shard, bank and captions. So a
count that was killed goes on, on any number of ranks, and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.comm import Comm, agreed
from trainer.concepts.bank import Bank, refuse_unknown
from trainer.concepts.counts import Counts
from trainer.concepts.matcher import Engine, Hits, Matcher
from trainer.concepts.tags import Tags
from trainer.concepts.words import Lemmas
from trainer.data.captions import field_texts
from trainer.data.decode import BadSample
from trainer.data.index import HEADER_BYTES, index_path, read_summary
from trainer.data.remote import read_file
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import ConfigError, DataError
from trainer.hashing import key_of, permutation

MOST_LOOKED_AT = 10_000
"""Samples that are read in search of a field before it counts as missing."""
SHARDS, COUNTS, BANK = "shards", "counts.safetensors", "bank.jsonl"


class Captions(NamedTuple):
    """Where captions are, and in which language: `{"en": "txt", "de": "lang.de"}`."""

    fields: Mapping[str, str]
    lemmas: Mapping[str, str]
    """Of each language; `english` for en and `none` for others where nothing is said."""
    engine: Engine = "trie"

    def matchers(self, bank: Bank) -> list[tuple[str, Matcher]]:
        """Field and matcher of each language, by its name."""
        refuse_unknown(list(self.fields), bank)
        return [
            (
                self.fields[language],
                Matcher(
                    bank,
                    language=language,
                    lemmas=Lemmas(self.lemma_source(language)),
                    engine=self.engine,
                ),
            )
            for language in sorted(self.fields)
        ]

    def lemma_source(self, language: str) -> str:
        return self.lemmas.get(language, "english" if language == "en" else "none")


def told_captions(fields: Sequence[str], lemmas: Sequence[str], engine: Engine) -> Captions:
    """Captions as a command names them: `en=txt`."""
    where, words = dict(pairs_of(fields, "--captions")), dict(pairs_of(lemmas, "--lemmas"))
    if unread := [language for language in words if language not in where]:
        raise ConfigError(f"--lemmas {unread[0]}=...: no captions are read in {unread[0]!r}")
    return Captions(where, words, engine)


def pairs_of(given: Sequence[str], option: str) -> list[tuple[str, str]]:
    """`LANGUAGE=VALUE`s of a command, taken apart."""
    pairs = []
    for entry in given:
        key, equals, value = entry.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"{option} {entry!r} is not LANGUAGE=VALUE, as en=txt")
        pairs.append((key, value))
    return pairs


def count_shards(
    spec: str,
    bank: Bank,
    captions: Captions,
    out: Path,
    comm: Comm,
    *,
    tags: Tags | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Counts:
    """The sum over all shards, on every rank; OUT has it with the bank, and a file a shard."""
    shards = ShardSet.open(spec)
    matchers = captions.matchers(bank)
    agreed(comm, lambda: refuse_fields_of_nobody(shards, captions) if comm.is_main else None)
    nothing = Counts.none(
        source=source_of(bank, captions, matchers, None if tags is None else tags.digest),
        languages=sorted(captions.fields),
        num_concepts=len(bank),
    )
    names = shards.names
    own = range(comm.rank, len(shards.shards), comm.world_size)

    def work() -> None:
        for row in own:
            path = out / SHARDS / f"{names[row]}.safetensors"
            if not _is_done(path, shards, row, nothing.source):
                counted = _count(shards, row, matchers, tags, nothing)
                counted.save(path, shard=names[row], index=_digest(shards, row))
                say(f"{names[row]}: {counted.total('samples')} samples")

    agreed(comm, work)
    files = [out / SHARDS / f"{name}.safetensors" for name in names]
    total = sum((Counts.open(path)[0] for path in files), nothing)
    if tags is not None and not total.total("tagged"):
        raise DataError(
            f"none of {total.total('samples')} samples has a line in {tags.path}; its lines name a "
            "shard (without .tar), a key and, where shards are of a named set, that set"
        )
    agreed(comm, lambda: _finish(total, bank, out) if comm.is_main else None)
    return total


def refuse_fields_of_nobody(shards: ShardSet, captions: Captions) -> None:
    """DataError where no sample, of those that are looked at, has a text in a captions' field."""
    missing = dict(captions.fields)
    order = permutation(len(shards), key_of("captions check"))[:MOST_LOOKED_AT]
    for index in order.tolist():
        try:
            fields = shards.read(index).fields
            missing = {k: name for k, name in missing.items() if not field_texts(fields, name)}
        except (BadSample, DamagedSample):
            continue
        if not missing:
            return
    if len(order) and missing:
        language, name = next(iter(missing.items()))
        raise DataError(
            f"none of {len(order)} samples has a text under {name!r}, where the captions in "
            f"{language!r} should be; name another field"
        )


def _count(
    shards: ShardSet,
    row: int,
    matchers: Sequence[tuple[str, Matcher]],
    tags: Tags | None,
    nothing: Counts,
) -> Counts:
    counts = nothing.copy()
    first = sum(shards.sizes[:row])
    for index in range(first, first + shards.sizes[row]):
        try:
            raw = shards.read(index)
            hits = [hits_of(raw.fields, field, find) for field, find in matchers]
        except (BadSample, DamagedSample):
            counts.add_unreadable()
            continue
        counts.add_sample(hits, None if tags is None else tags.of(raw.sample_id))
    return counts


def hits_of(fields: dict[str, bytes], field: str, find: Matcher) -> Hits | None:
    """Of all texts of the field together, each read by itself; None without any text."""
    found = [find(text) for text in field_texts(fields, field)]
    if not found:
        return None
    phrase, bag = ({c for hits in found for c in hits[side]} for side in (0, 1))
    return Hits(tuple(sorted(phrase)), tuple(sorted(bag)))


def _is_done(path: Path, shards: ShardSet, row: int, source: str) -> bool:
    """DataError where the file is of another shard, bank or captions."""
    if not path.exists():
        return False
    counts, about = Counts.open(path)
    if counts.source != source or about.get("index") != _digest(shards, row):
        raise DataError(
            f"{path} was counted with another bank, lemmas, captions or tags, or its shard has "
            "changed since; give another folder, or delete it"
        )
    return True


def _finish(total: Counts, bank: Bank, out: Path) -> None:
    bank.save(out / BANK)
    total.save(out / COUNTS)


def source_of(
    bank: Bank,
    captions: Captions,
    matchers: Sequence[tuple[str, Matcher]],
    tags: str | None,
) -> str:
    """SHA-256 of everything that decides the counts, apart from the samples."""
    text = json.dumps(
        {
            "bank": bank.digest,
            "fields": dict(captions.fields),
            "lemmas": [matcher.lemmas.digest for _, matcher in matchers],
            "tags": tags,
        },
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(shards: ShardSet, row: int) -> str:
    """Of the shard's index, which changes with any byte of it."""
    path = index_path(shards.shards[row])
    return read_summary(read_file(path)[:HEADER_BYTES], path=path).digest.hex()
