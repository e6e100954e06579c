"""AdamW and SGD for the rows of a table of which a step touches a few."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from trainer.config import Frozen, OnlyWhere

Places = Int64[Tensor, " touched"] | None
"""Where rows stand in a table; None is all of them, in order."""

CHUNK_NUMBERS = 1 << 18
"""Numbers updated at a time: their moments and temporaries stay in the cache."""
DEVICE_NUMBERS = 1 << 28
"""The same on a GPU, which wants few launches: 1 GiB."""


class RowOptimizerConfig(Frozen):
    """How rows learn. A row counts the steps that touched it; Adam corrects by that count."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """What moves the rows that a step has drawn."""
    learning_rate: NonNegativeFloat = 1e-3
    """At the schedule's factor of one."""
    weight_decay: NonNegativeFloat = 0.05
    """As in torch.optim: beside the gradient in AdamW, added to it in SGD. An untouched row's
    decay is made up for when it is touched again."""
    betas: Annotated[tuple[float, float], OnlyWhere("optimizer", "adamw")] = (0.9, 0.98)
    """Share of the mean and of the mean square of gradients that stays, per step of a row."""
    epsilon: Annotated[float, OnlyWhere("optimizer", "adamw"), Field(gt=0)] = 1e-8
    """Added to the root of the mean square that a step is divided by."""
    momentum: Annotated[float, OnlyWhere("optimizer", "sgd"), Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    rows: Annotated[Literal["float32", "bfloat16"], OnlyWhere("optimizer", "adamw")] = "float32"
    """`bfloat16`: 5 bytes a number, moments included, instead of 12. Rows and their mean gradients
    are halves and mean squares bytes, rounded up or down by a hash of seed, row and step."""
    dense: bool = False
    """Move all rows in every step, with a gradient of zero where there is none: torch.optim."""

    @model_validator(mode="after")
    def _decay_leaves_something(self) -> RowOptimizerConfig:
        if self.dense and self.rows == "bfloat16":
            raise ValueError(
                "dense needs a float32 gradient of all rows, more than rows: bfloat16 saves; "
                "drop one of the two"
            )
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError("learning_rate x weight_decay must be below 1, or rows change sign")
        return self


class RowOptimizer:
    """Updates rows of one table in place, and holds what it must remember of each.

    A touched row moves as torch.optim would move it. Any other keeps weight, moments and count;
    only the decay that it owes grows, and `settle` pays it: directions, which are all that cosines
    see, do not change by that, but the length decides how far the next step turns the row.
    """

    def __init__(self, rows: Float[Tensor, "rows dim"], config: RowOptimizerConfig) -> None:
        self.config = config
        self.rows = rows
        names = ("exp_avg", "exp_avg_sq") if config.optimizer == "adamw" else ("momentum",)
        self.moments = {name: torch.zeros_like(rows) for name in names}
        self.steps = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
        """Updates of each row."""
        self.log_decay = 0.0
        """Of a row that has paid everything since the first step."""
        self.paid = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        """The part of it that each row has paid."""

    def settle(self, places: Places) -> None:
        """Decay these rows for the steps that did not touch them."""
        if not self.config.weight_decay or self.config.dense:
            return
        for chosen, _ in self._pieces(places):
            owed = (self.log_decay - self.paid[chosen]).exp().to(self.rows.dtype)
            _write(self.rows, chosen, _read(self.rows, chosen).mul_(owed[:, None]))
            self.paid[chosen] = self.log_decay

    def taken(self, places: Places) -> Float[Tensor, "touched dim"]:
        """These rows after the decay that they owe: a copy, or all of them as they are stored."""
        self.settle(places)
        return self.rows.detach() if places is None else self.rows.index_select(0, places)

    def update(
        self, places: Places, gradient: Float[Tensor, "touched dim"], *, factor: float
    ) -> None:
        """One step on the rows at these places (each once), with the learning rate times `factor`.
        The gradient's memory is used up."""
        rate = self.config.learning_rate * factor
        if places is not None and self.config.dense:
            self._update_all(places, gradient, rate)
            return
        if self._by_kernel:
            self._update_by_kernel(places, gradient, rate)
        else:
            for chosen, some in self._pieces(places):
                self._update_some(chosen, gradient[some], rate)
        if not self.config.dense:
            self.log_decay += math.log1p(-rate * self.config.weight_decay)
            self.paid[slice(None) if places is None else places] = self.log_decay

    def _pieces(self, places: Places) -> Iterator[tuple[Tensor | slice, slice]]:
        """Some rows of the table, and where they stand among those at the places."""
        count = len(self.rows) if places is None else len(places)
        for some in _chunks(count, self.rows):
            yield (some if places is None else places[some]), some

    def _update_all(self, places: Tensor, gradient: Tensor, rate: float) -> None:
        """As if the gradient were zero elsewhere; a dense one exists a chunk at a time."""
        ordered, order = places.sort()
        for some in _chunks(len(self.rows), self.rows):
            ends = torch.tensor([some.start, some.stop], device=ordered.device)
            begin, end = torch.searchsorted(ordered, ends).tolist()
            dense = torch.zeros_like(self.rows[some])
            dense.index_copy_(0, ordered[begin:end] - some.start, gradient[order[begin:end]])
            self._update_some(some, dense, rate)

    def _update_some(self, chosen: Tensor | slice, gradient: Tensor, rate: float) -> None:
        rows = _read(self.rows, chosen)
        moments = {name: _read(values, chosen) for name, values in self.moments.items()}
        steps = self.steps[chosen] + 1
        if self.config.optimizer == "adamw":
            self._adamw(rows, gradient, moments, steps, rate)
        else:
            self._sgd(rows, gradient, moments["momentum"], rate)
        _write(self.rows, chosen, rows)
        for name, values in moments.items():
            _write(self.moments[name], chosen, values)
        self.steps[chosen] = steps

    @property
    def _by_kernel(self) -> bool:
        on_gpu = self.rows.device.type == "cuda" and self.rows.dtype == torch.float32
        return on_gpu and self.config.optimizer == "adamw"

    def _update_by_kernel(self, places: Places, gradient: Tensor, rate: float) -> None:
        from trainer.kernels.triton_rows import update_rows  # Triton is where GPUs are

        chosen = slice(None) if places is None else places
        steps = self.steps[chosen] + 1
        self.steps[chosen] = steps
        sizes, corrections = self._of_counts(steps, rate)
        update_rows(
            *(self.rows, self.moments, gradient, places),
            sizes=sizes,
            corrections=corrections,
            kept=1 - rate * self.config.weight_decay,
            betas=self.config.betas,
            epsilon=self.config.epsilon,
        )

    def _of_counts(self, steps: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """The size of each row's step, and what the root of its mean square is divided by."""
        (beta, beta_square), counts = self.config.betas, steps.to(torch.float64)
        correction = (1 - beta_square**counts).sqrt().to(self.rows.dtype)
        return (rate / (1 - beta**counts)).to(self.rows.dtype), correction

    def _adamw(
        self,
        rows: Tensor,
        gradient: Tensor,
        moments: dict[str, Tensor],
        steps: Tensor,
        rate: float,
    ) -> None:
        """Loshchilov and Hutter, arXiv 1711.05101, with a step count for each row."""
        (beta, beta_square), config = self.config.betas, self.config
        rows.mul_(1 - rate * config.weight_decay)
        moments["exp_avg"].lerp_(gradient, 1 - beta)
        moments["exp_avg_sq"].mul_(beta_square).addcmul_(gradient, gradient, value=1 - beta_square)
        size, correction = (each[:, None] for each in self._of_counts(steps, rate))
        denominator = torch.sqrt(moments["exp_avg_sq"], out=gradient)
        denominator.div_(correction).add_(config.epsilon)
        rows.sub_(torch.div(moments["exp_avg"], denominator, out=gradient).mul_(size))

    def _sgd(self, rows: Tensor, gradient: Tensor, momentum: Tensor, rate: float) -> None:
        gradient.add_(rows, alpha=self.config.weight_decay)
        momentum.mul_(self.config.momentum).add_(gradient)
        rows.sub_(momentum, alpha=rate)


def _chunks(count: int, rows: Tensor) -> Iterator[slice]:
    numbers = CHUNK_NUMBERS if rows.device.type == "cpu" else DEVICE_NUMBERS
    size = max(1, numbers // max(1, rows.shape[1]))
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def _read(values: Tensor, chosen: Tensor | slice) -> Tensor:
    """The chosen rows: a view of a slice, a copy of anything else."""
    return values[chosen] if isinstance(chosen, slice) else values.index_select(0, chosen)


def _write(values: Tensor, chosen: Tensor | slice, changed: Tensor) -> None:
    """Nothing to do for a slice: `changed` is a view, and was changed in place."""
    if isinstance(chosen, Tensor):
        values.index_copy_(0, chosen, changed)
