"""Distinct pictures, their texts, and which of them belong together, for retrieval.

As in the published figures of COCO and Flickr30k (five captions a picture): a picture is one query
and one item of the gallery, however many samples show it; each of its captions is a text of its
own, right for that picture and no other. Two samples show the same picture when they have an equal
value under a stated json key, or, where they lack it, the same bytes.

Samples with a json key `concept_id` are right for all that share their concept: a picture has the
concepts of all samples that show it, a text those of all samples that say it, and a caption that
several of them share is one text. Unions are not closed transitively: two names of one drawing are
both right for it, but the other drawings of one name aren't right for the other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from trainer.comm import Comm
from trainer.data.captions import captions_in, value_at
from trainer.errors import DataError
from trainer.evals.features import Share
from trainer.evals.labels import class_of
from trainer.evals.samples import Record

Groups = Sequence[frozenset[str]]
"""Per item, what it shows or says: a picture and a text belong together where they share one."""


class Pairs(NamedTuple):
    """Of all ranks, and the same on all of them but for `own`."""

    pictures: Groups
    own: list[int]
    """Rows of this rank's share that stand for a picture: its first sample."""
    texts: list[str]
    """A caption of two pictures is here twice."""
    named: Groups
    """Of each text."""
    samples: list[int]
    """The id of the first sample that has the text."""
    num_samples: int


def paired(share: Share, comm: Comm, *, caption: str = "txt", picture: str = "pix") -> Pairs:
    """Pictures and texts in the order in which the samples first have them; collective."""
    own = [
        [
            _picture(record, picture),
            class_of(record, "concept_id"),
            record.sample_id,
            *texts_of(record, caption),
        ]
        for record in share.records
    ]
    ranks: list[list[list[Any]]] = comm.gather_json(own)
    first: dict[str, int] = {}
    shown: dict[str, set[str]] = defaultdict(set)
    named: dict[tuple[str, str, int], set[str]] = defaultdict(set)
    samples: dict[tuple[str, str, int], int] = {}
    for row, (shows, concept, sample_id, *texts) in enumerate(chain.from_iterable(ranks)):
        group = f"picture {shows}" if concept is None else f"concept {concept}"
        first.setdefault(shows, row)
        shown[shows].add(group)
        for text, number in _numbered(texts):
            name = (text, shows, number) if concept is None else (text, "", 0)
            named[name].add(group)
            samples.setdefault(name, sample_id)
    before = sum(len(rows) for rows in ranks[: comm.rank])
    return Pairs(
        pictures=[frozenset(shown[shows]) for shows in first],
        own=[row - before for row in first.values() if before <= row < before + len(own)],
        texts=[text for text, _, _ in named],
        named=[frozenset(groups) for groups in named.values()],
        samples=list(samples.values()),
        num_samples=sum(map(len, ranks)),
    )


def with_text(share: Share, caption: str, *, spec: str, comm: Comm) -> Share:
    """The rows that have a text under the key; a DataError, on every rank, where none has."""
    rows = [i for i, record in enumerate(share.records) if texts_of(record, caption)]
    if not comm.any(bool(rows)):
        raise DataError(f"no sample of {spec} has a text under {caption!r}; set `caption`")
    index = torch.tensor(rows, dtype=torch.int64, device=share.features.device)
    return Share(share.features[index], [share.records[i] for i in rows])


def texts_of(record: Record, caption: str) -> list[str]:
    """A sample's texts, white space collapsed; none where it has none.

    Every item of a list is a text, and so is every line of a text with several lines. `a.b` reads
    key b of the object under a.
    """
    return captions_in(value_at(record.values, caption))


def _numbered(texts: Sequence[str]) -> list[tuple[str, int]]:
    """Each text with how often it came before in the sample: the protocol counts it every time."""
    seen: Counter[str] = Counter()
    numbered = []
    for text in texts:
        numbered.append((text, seen[text]))
        seen[text] += 1
    return numbered


def _picture(record: Record, key: str) -> str:
    """Samples of equal value show the same picture."""
    stated = class_of(record, key)
    if stated is not None:
        return f"{key} {stated}"
    return record.picture or f"sample {record.sample_id}"
