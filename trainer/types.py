"""The tuples that travel: samples in, features through, losses out, progress along.

NamedTuples, because ZeRO-3's hooks look for tensors in tuples and do not see into dataclasses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TowerName = Literal["image", "text", "other"]
"""The part of a model that a parameter belongs to."""

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""Tensors by name, or pairs that are made one by one (gathered from the ranks, say)."""


class Batch(NamedTuple):
    """The samples of one micro-batch on this rank; a missing modality is None."""

    images: Float[Tensor, "batch 3 height width"] | None
    """Normalised pixels."""
    tokens: Int[Tensor, "batch length"] | None
    token_mask: Bool[Tensor, "batch length"] | None
    """True where a token is real, False on padding."""
    sample_id: Int[Tensor, " batch"]
    """63-bit ids; labels and teacher vectors are joined by them, never by position."""
    epoch: Int[Tensor, " batch"] | None = None
    """How often the run had been through the data when it came to the sample."""
    texts: Float[Tensor, "batch drawn dim"] | None = None
    """Vectors of texts that this visit of the sample draws, where a recipe asks for them."""
    views: Float[Tensor, "batch further 3 height width"] | None = None
    """Further random views of the images, where a recipe wants more than one."""
    cover: Float[Tensor, "batch 3 cover_height cover_width"] | None = None
    """A look whose crop holds those of all views, where a recipe wants a covering geometry."""
    boxes: Float[Tensor, "batch count 4"] | None = None
    """Left, top, right and bottom of each view's crop in `cover`, whose sides have length one. A
    view that is flipped has its left edge on the right."""
    more: dict[str, Tensor] | None = None
    """What parts add before a step, by name: a row for each sample. `kept` [batch, count, kept] are
    the patches of each view that the image tower reads, in ascending order."""


class Features(NamedTuple):
    """What a model says of one micro-batch. Rows are float32 unit vectors."""

    image: Float[Tensor, "batch dim"] | None = None
    text: Float[Tensor, "batch dim"] | None = None
    image_projected: Float[Tensor, "batch projected"] | None = None
    """Output of the image prototype head (ProtoCLIP's h^I)."""
    text_projected: Float[Tensor, "batch projected"] | None = None
    """Output of the text prototype head (ProtoCLIP's h^T)."""
    logit_scale: Float[Tensor, ""] | None = None
    """Multiplier of cosines, already clamped (not its log)."""
    logit_bias: Float[Tensor, ""] | None = None
    prototype_scale: Float[Tensor, ""] | None = None
    """Multiplier of prototype logits, already clamped (not its log)."""
    more: dict[str, Tensor] | None = None
    """What a method's own model says beside these, by name: a row for each sample of the
    micro-batch, or a scalar."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Features:
        """Features that say `tensors`; names that no field has go into `more`."""
        own = {name: value for name, value in tensors.items() if name in cls._fields}
        more = {name: value for name, value in tensors.items() if name not in cls._fields}
        return cls(**own, more=more or None)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was said, by name, in the order of the fields and then of `more`."""
        *own, _ = zip(self._fields, self, strict=True)
        said = {name: value for name, value in own if isinstance(value, Tensor)}
        return said | (self.more or {})

    def tensor(self, name: str) -> Tensor:
        """What must have been said; a KeyError that lists what was where it was not."""
        said = self.tensors()
        if name not in said:
            raise KeyError(f"the model says no {name!r}, only {', '.join(said) or 'nothing'}")
        return said[name]


class Losses(Mapping[str, Tensor]):
    """Named loss terms with weights, in the order in which they were added.

    `losses[name]` is the unweighted value; `total` is the weighted sum. A term of weight zero is
    left out of the total, so NaN in an unused term cannot reach the parameters.
    """

    def __init__(self, terms: Mapping[str, tuple[Tensor, float]] | None = None) -> None:
        self._terms: dict[str, tuple[Tensor, float]] = dict(terms or {})

    @classmethod
    def of(cls, **values: Tensor) -> Losses:
        """Terms of weight one."""
        return cls({name: (value, 1.0) for name, value in values.items()})

    def with_term(self, name: str, value: Tensor, weight: float = 1.0) -> Losses:
        return Losses({**self._terms, name: (value, weight)})

    @property
    def total(self) -> Tensor:
        used = [value * weight for value, weight in self._terms.values() if weight != 0.0]
        if not used:
            raise ValueError("no loss term has a weight other than zero")
        return torch.stack(used).sum()

    @property
    def weights(self) -> dict[str, float]:
        return {name: weight for name, (_, weight) in self._terms.items()}

    def detach(self) -> Losses:
        return Losses({n: (value.detach(), weight) for n, (value, weight) in self._terms.items()})

    def __add__(self, other: Losses) -> Losses:
        """Term by term; a term missing on one side counts as zero there."""
        merged = dict(self._terms)
        for name, (value, weight) in other._terms.items():
            merged[name] = (merged[name][0] + value if name in merged else value, weight)
        return Losses(merged)

    def __truediv__(self, divisor: float) -> Losses:
        return Losses({n: (value / divisor, weight) for n, (value, weight) in self._terms.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._terms[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)


@dataclass(frozen=True)
class Progress:
    """What a run has done so far. All counts are over all ranks."""

    step: int = 0
    """Optimizer steps applied."""
    samples: int = 0
    """Training samples consumed: the cursor into the stream."""
    skipped: int = 0
    """Steps that were not applied because a gradient was not finite."""

    def advance(self, *, samples: int, applied: bool) -> Progress:
        return replace(
            self,
            step=self.step + int(applied),
            samples=self.samples + samples,
            skipped=self.skipped + int(not applied),
        )
