"""How often concepts occur: sums over samples, so neither order nor shards nor workers matter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trainer.concepts.matcher import Hits
from trainer.errors import DataError
from trainer.store.header import write_whole

FORMAT = "protoscale-concepts-1"


@dataclass(frozen=True)
class Counts:
    """Counts of one bank's concepts. `a + b` are those of both sets of samples together."""

    source: str
    """Digest of bank, lemmas, caption fields and tags: counts of different sources never add."""
    languages: tuple[str, ...]
    text: Int64[np.ndarray, "languages concepts"]
    """Samples with a caption of this language that has the concept as a phrase."""
    bag: Int64[np.ndarray, "languages concepts"]
    """The same for all words of the concept in any order; at least as many."""
    any_text: Int64[np.ndarray, " concepts"]
    """Samples with the phrase in any of the languages."""
    image: Int64[np.ndarray, " concepts"]
    """Samples whose image is tagged with the concept."""
    joint: Int64[np.ndarray, " concepts"]
    """Samples that have it in a caption and in the image."""
    totals: Int64[np.ndarray, " totals"]
    """As `TOTALS` names them."""

    @classmethod
    def none(cls, *, source: str, languages: Sequence[str], num_concepts: int) -> Counts:
        """What no sample adds up to."""
        table = np.zeros((len(languages), num_concepts), np.int64)
        row = np.zeros(num_concepts, np.int64)
        totals = np.zeros(len(TOTALS), np.int64)
        return cls(
            *(source, tuple(languages), table, table.copy()),
            *(row, row.copy(), row.copy(), totals),
        )

    def __add__(self, other: Counts) -> Counts:
        if (self.source, self.languages) != (other.source, other.languages):
            raise DataError(
                "these counts are of different banks, lemmas, captions or tags; count anew"
            )
        return replace(self, **{key: value + getattr(other, key) for key, value in self._arrays()})

    def copy(self) -> Counts:
        """Counts of their own, to add samples to."""
        own: dict[str, Any] = {key: value.copy() for key, value in self._arrays()}
        return replace(self, **own)

    def total(self, name: str) -> int:
        return int(self.totals[TOTALS.index(name)])

    def add_sample(self, hits: Sequence[Hits | None], tags: Sequence[int] | None) -> None:
        """Count one sample in place: what each language's caption names, and the image's tags.

        None where there is no caption of a language; `tags` None where the image has none known.
        """
        named: set[int] = set()
        for language, found in enumerate(hits):
            if found is not None:
                self.text[language, list(found.phrase)] += 1
                self.bag[language, list(found.bag)] += 1
                named |= set(found.phrase)
        self.any_text[list(named)] += 1
        self._total("samples")
        if named:
            self._total("with_concept_in_text")
        if tags is not None:
            self._count_image(named, set(tags))

    def add_unreadable(self) -> None:
        """A sample that could not be read: in no denominator."""
        self._total("unreadable")

    def _count_image(self, named: set[int], seen: set[int]) -> None:
        self.image[list(seen)] += 1
        self.joint[list(named & seen)] += 1
        self._total("tagged")
        if not named & seen:
            self._total("misaligned")
        if named and seen:
            self._total("both_have_concepts")
            if not named & seen:
                self._total("misaligned_of_both")

    def _total(self, name: str) -> None:
        self.totals[TOTALS.index(name)] += 1

    def frequency(self, which: str) -> NDArray[np.int64]:
        """One number a concept: `text`, `bag` (summed over languages), `image` or `joint`."""
        if which not in FREQUENCIES:
            raise DataError(f"no frequency {which!r}; there are {', '.join(FREQUENCIES)}")
        if which in ("image", "joint") and not self.total("tagged"):
            raise DataError(
                f"no image was tagged, so there is no {which} frequency; count with tags"
            )
        by_name = {"text": self.any_text, "bag": self.bag.sum(axis=0)}
        return by_name[which] if which in by_name else np.asarray(getattr(self, which))

    def figures(self) -> dict[str, Any]:
        """The totals and the two shares of pairs whose caption and image have nothing in common.

        `misaligned`: of all tagged samples, no common concept (algorithm 1 of the paper);
        `misaligned_of_both`: of those only that have concepts on both sides.
        """
        totals: dict[str, Any] = dict(zip(TOTALS, self.totals.tolist(), strict=True))
        for part, whole in (("misaligned", "tagged"), ("misaligned_of_both", "both_have_concepts")):
            totals[f"{part}_share"] = totals[part] / totals[whole] if totals[whole] else None
        return totals

    def save(self, path: Path, **header: str) -> None:
        """All of the file or nothing; equal counts are equal bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "source": self.source, "languages": self.languages, **header}
        # One key: several would be written in an order that differs from process to process.
        text = json.dumps(about, sort_keys=True)
        write_whole(path, save(dict(self._arrays()), metadata={"about": text}))

    @classmethod
    def open(cls, path: Path) -> tuple[Counts, dict[str, str]]:
        """The counts, and what else their header says. DataError where it is no such file."""
        try:
            with safe_open(path, framework="np") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        except FileNotFoundError:
            raise DataError(
                f"no counts at {path}; make them with tools/concepts.py count"
            ) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} holds no counts: {error}") from None
        if about.pop("format", None) != FORMAT:
            raise DataError(f"{path} holds no counts of the form {FORMAT}; count anew")
        languages = tuple(about.pop("languages"))
        return cls(source=about.pop("source"), languages=languages, **arrays), about

    def _arrays(self) -> list[tuple[str, NDArray[np.int64]]]:
        return [(name, getattr(self, name)) for name in _ARRAYS]


TOTALS = (
    *("samples", "unreadable", "with_concept_in_text", "tagged", "misaligned"),
    *("both_have_concepts", "misaligned_of_both"),
)
FREQUENCIES = ("text", "bag", "image", "joint")
_ARRAYS = tuple(f.name for f in fields(Counts) if f.name not in ("source", "languages"))
