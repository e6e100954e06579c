"""One pass over shards: everything that later tools ask of the samples, a few files a shard.

OUT/images/          the images' vectors, an embedding store; OUT/texts/ the captions'
OUT/rows/            size, hashes, cosine, language, concepts of each sample (`rows.Rows`)
OUT/concepts/        counts of a bank's concepts, as tools/concepts.py count writes them
OUT/ledger/          the samples that could not be used, and why: a line each, a file a shard
OUT/scan.json        totals

A shard is done when its rows are there and say that they are of this shard and these questions.
They are written last, so a scan that was killed goes on with the next shard, on any number of
processes, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.comm import Comm, agreed
from trainer.concepts import Bank, Counts
from trainer.concepts.count import BANK, COUNTS, SHARDS, Captions, hits_of, source_of
from trainer.concepts.matcher import Hits
from trainer.curation.languages import Languages
from trainer.curation.looked import Looked, rows_of, short_hash
from trainer.curation.pair import Pair
from trainer.curation.perceptual import perceptual_hash
from trainer.curation.rows import (
    DAMAGED,
    NO_CAPTION,
    NO_IMAGE,
    REASONS,
    SUFFIX,
    USABLE,
    RowsHeader,
    is_done,
    open_rows,
    save_rows,
)
from trainer.curation.tagger import Tagger
from trainer.data.decode import BadSample
from trainer.data.shards import DamagedSample, RawSample, ShardSet
from trainer.long_work import LongWork
from trainer.store import StoreWriter
from trainer.store.header import write_whole

IMAGES, TEXTS, ROWS, CONCEPTS, LEDGER = "images", "texts", "rows", "concepts", "ledger"
TOTALS = "scan.json"
CHUNK = 256
"""Samples that are held decoded at once."""
Say = Callable[[str], None]


class Questions(NamedTuple):
    """What is asked of every sample."""

    pair: Pair
    languages: Languages
    bank: Bank | None = None
    captions: Captions = Captions({"en": "txt"}, {})
    tagger: Tagger | None = None
    keep_texts: bool = False
    """Whether the captions' vectors are stored."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides the answers, apart from the samples."""
        bank = None
        if self.bank is not None:
            matchers = self.captions.matchers(self.bank)
            bank = source_of(self.bank, self.captions, matchers, self.tags)
        text = json.dumps(
            {
                "pair": self.pair.identity.model_dump(),
                "languages": self.languages.source,
                "bank": bank,
                "texts": self.keep_texts,
            },
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def tags(self) -> str | None:
        return None if self.tagger is None else self.tagger.digest


def scan(
    spec: str, out: Path, ask: Questions, comm: Comm, *, say: Say = lambda line: None
) -> dict[str, Any]:
    """Scan what is not scanned yet; the totals of all shards, on every rank."""
    shards = ShardSet.open(spec)
    work = _Pass(shards, out, ask, comm)
    own = range(comm.rank, len(shards.shards), comm.world_size)
    todo = [row for row in own if not work.is_done(row)]
    total = sum(shards.sizes[row] for row in todo)

    def run() -> None:
        with LongWork("scanning", total=total, unit="samples") as progress:
            for row in todo:
                work.scan(row, progress)

    agreed(comm, run)
    agreed(comm, work.finish if comm.is_main else lambda: None)
    say(f"{len(shards.shards)} shards, {sum(comm.gather_json(len(todo)))} of them scanned now")
    totals: dict[str, Any] = json.loads((out / TOTALS).read_text())
    return totals


class _Pass:
    def __init__(self, shards: ShardSet, out: Path, ask: Questions, comm: Comm) -> None:
        self.shards, self.out, self.ask = shards, out, ask
        self.names, self.asked = shards.names, ask.digest
        sources = {
            name: (digest, size)
            for name, digest, size in zip(self.names, shards.digests, shards.sizes, strict=True)
        }
        identity = ask.pair.identity
        stores = {IMAGES: identity}
        if ask.keep_texts:
            stores[TEXTS] = identity.model_copy(update={"reads": ask.pair.caption_field})
        self.writers = {
            name: StoreWriter.begin(out / name, each, sources) for name, each in stores.items()
        }
        self.matchers = [] if ask.bank is None else ask.captions.matchers(ask.bank)
        self.nothing = None
        if ask.bank is not None:
            self.nothing = Counts.none(
                source=source_of(ask.bank, ask.captions, self.matchers, ask.tags),
                languages=sorted(ask.captions.fields),
                num_concepts=len(ask.bank),
            )
        agreed(comm, self._begin if comm.is_main else lambda: None)

    def _begin(self) -> None:
        for name in (ROWS, LEDGER):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        for writer in self.writers.values():
            writer.announce()

    def path(self, row: int) -> Path:
        return self.out / ROWS / f"{self.names[row]}{SUFFIX}"

    def is_done(self, row: int) -> bool:
        return is_done(self.path(row), self.shards.digests[row], self.asked)

    def scan(self, row: int, progress: LongWork) -> None:
        """Look at every sample of a shard, then write what was found, the rows last."""
        first = sum(self.shards.sizes[:row])
        looked: list[Looked] = []
        nothing = torch.empty(0, self.ask.pair.identity.dim)
        images, texts = [nothing], [nothing]
        for begin in range(first, first + self.shards.sizes[row], CHUNK):
            end = min(begin + CHUNK, first + self.shards.sizes[row])
            some = [self._look(index) for index in range(begin, end)]
            usable = [each for each in some if each.status == USABLE]
            images.append(
                self.ask.pair.image_vectors([e.pixels for e in usable if e.pixels is not None])
            )
            texts.append(self.ask.pair.text_vectors([e.caption or "" for e in usable]))
            looked += [each._replace(pixels=None) for each in some]
            progress.done(len(some))
        self._write(row, looked, torch.cat(images), torch.cat(texts))

    def _look(self, index: int) -> Looked:
        _, key, sample_id = self.shards.name_of(index)
        try:
            sample = self.shards.read(index)
        except DamagedSample as error:
            return Looked(sample_id, DAMAGED, str(error), key)
        try:
            picture = self.ask.pair.picture(sample)
        except BadSample as error:
            return Looked(sample_id, NO_IMAGE, str(error), key)
        try:
            caption, hits = self.ask.pair.caption(sample), self._hits(sample)
        except BadSample as error:
            return Looked(sample_id, NO_CAPTION, str(error), key)
        columns = (
            *(picture.width, picture.height),
            perceptual_hash(picture.squeezed.numpy()),
            short_hash(picture.data),
        )
        return Looked(sample_id, USABLE, "", key, picture.pixels, caption, columns, hits)

    def _hits(self, sample: RawSample) -> tuple[Hits | None, ...]:
        return tuple(hits_of(sample.fields, field, find) for field, find in self.matchers)

    def _write(self, row: int, looked: list[Looked], images: Tensor, texts: Tensor) -> None:
        usable = [each for each in looked if each.status == USABLE]
        ids = np.array([each.sample_id for each in usable], np.int64)
        name = self.names[row]
        tags = [[] for _ in usable] if self.ask.tagger is None else self.ask.tagger(images)
        for store, vectors in ((IMAGES, images), (TEXTS, texts)):
            if store in self.writers:
                self.writers[store].write(name, ids, vectors[:, None])
        shard = self.shards.shards[row]
        lines = [
            json.dumps({"shard": shard, "key": each.key, "reason": each.reason}) + "\n"
            for each in looked
            if each.status != USABLE
        ]
        write_whole(self.out / LEDGER / f"{name}.jsonl", "".join(lines).encode())
        if self.nothing is not None:
            self._count(row, looked, tags)
        scores = (images * texts).sum(dim=1).numpy()
        header = RowsHeader(self.shards.digests[row], self.asked, self.ask.languages.names)
        save_rows(self.path(row), rows_of(looked, scores, tags, self.ask.languages), header)

    def _count(self, row: int, looked: Sequence[Looked], tags: Sequence[Sequence[int]]) -> None:
        assert self.nothing is not None
        counts, seen = self.nothing.copy(), iter(tags)
        for each in looked:
            if each.status != USABLE:
                counts.add_unreadable()
                continue
            shown = next(seen)
            counts.add_sample(each.hits, None if self.ask.tagger is None else shown)
        path = self.out / CONCEPTS / SHARDS / f"{self.names[row]}{SUFFIX}"
        counts.save(path, shard=self.names[row], index=self.shards.digests[row])

    def finish(self) -> None:
        """Headers of the stores, the sum of the counts, and the totals of all shards."""
        for writer in self.writers.values():
            writer.finish()
        totals = _totals(self)
        if self.nothing is not None and self.ask.bank is not None:
            folder = self.out / CONCEPTS
            files = [folder / SHARDS / f"{name}{SUFFIX}" for name in self.names]
            whole = sum((Counts.open(path)[0] for path in files), self.nothing)
            self.ask.bank.save(folder / BANK)
            whole.save(folder / COUNTS)
            totals["concepts"] = whole.figures()
        write_whole(self.out / TOTALS, (json.dumps(totals, indent=1) + "\n").encode())


def _totals(work: _Pass) -> dict[str, Any]:
    """Sums over all shards. Only usable samples are in a denominator."""
    status: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    tail = {"score": 0.0, "words": 0}
    for row in range(len(work.names)):
        rows, header = open_rows(work.path(row), ("status", "score", "words", "language"))
        status.update(REASONS[value] for value in rows.status.tolist())
        found = rows.language[rows.usable].tolist()
        languages.update(header.languages[number] or "unknown" for number in found)
        tail["score"] += float(rows.score[rows.usable].astype(np.float64).sum())
        tail["words"] += int(rows.words[rows.usable].sum())
    usable = status["usable"]
    return {
        "samples": {reason: status[reason] for reason in REASONS},
        "mean_cosine": tail["score"] / usable if usable else None,
        "mean_words": tail["words"] / usable if usable else None,
        "languages": dict(sorted(languages.items())),
        "asked": work.asked,
        "data": work.shards.lines,
    }
