"""A table of very many learnable prototypes, its rows divided over the ranks.

What ZeRO would do wrong: it would gather the table, and give every row a dense gradient. Here a
rank owns a contiguous range of rows and everything about them: which are sampled, their moments,
their part of a checkpoint. Only features, labels and sums over rows travel (Partial FC,
arXiv 2203.15565; MLCD, arXiv 2407.17331). The losses are in `trainer.losses`; one step is

    active = head.active(labels, step)
    statistics = prototype_statistics(features, labels, active, head.comm, options.logits)
    multilabel_loss(statistics, options).loss.backward()
    head.after_step(step, applied=head.gradients_finite(), learning_rate_factor=1.0)

Gradients of rows are tangent to the sphere, because the losses compare directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor

from trainer.comm import Comm
from trainer.config import LocalPath
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.losses.learned_prototypes import ActiveRows
from trainer.parts.half_rows import HalfRowOptimizer, row_optimizer
from trainer.parts.initial_rows import normal_rows, stored_rows
from trainer.parts.row_optimizer import Places, RowOptimizerConfig
from trainer.parts.row_ranges import fill_rows, row_pieces
from trainer.parts.sampling import Sampling, places, sampled_rows

HALF_ROWS = "half_rows"
"""Stands in a checkpoint whose rows and moments are not float32."""


class PrototypeHeadConfig(RowOptimizerConfig):
    """How a table of prototypes starts, what it compares with in a step, and how it learns."""

    sample_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of the rows that are negatives of a step. The positives are added to them. Recipes
    raise it for a table of so few rows that a step might draw none; zero stays zero."""
    sampling: Sampling = "rows"
    """`blocks`: 128 neighbouring rows are drawn together."""
    union_positives: bool | None = None
    """Partial FC's rule: what is a positive of one sample is a negative of all others. Else it is
    one only if it was drawn. Where None, on for the loss `pfc_ce` and off for all others."""
    logq: bool = False
    """Raise the drawn rows' logits by -ln(sample_rate), so that their sum estimates that of all."""
    init: Literal["normal"] | LocalPath = "normal"
    """Or a safetensors file with one table of the head's size, such as centroids; its rows are
    brought to the length that normal ones have."""
    init_deviation: PositiveFloat = 0.01
    """Standard deviation of the first values of its rows."""
    clip_norm: PositiveFloat | None = None
    """Of the gradient of all rows of all ranks together."""
    group_size: NonNegativeInt = 0
    """Neighbouring ranks that share one table; every such group has a copy and compares with its
    own samples only. 0: all ranks share one."""
    offload: bool = False
    """Keep rows and moments in the host's memory, and update them there."""


class Touched(NamedTuple):
    """The rows of one step."""

    leaf: Float[Tensor, "touched dim"]
    places: Places


class _Chosen(NamedTuple):
    """Rows that a step needs, by number."""

    ids: Int64[Tensor, " touched"]
    num_negatives: int
    bias: Float[Tensor, " negatives"] | None

    def of(self, rows: Float[Tensor, "touched dim"]) -> ActiveRows:
        return ActiveRows(rows, self.ids.to(rows.device), self.num_negatives, self.bias)


class PrototypeHead:
    """This rank's rows of a table of `num_prototypes`; a Part."""

    note: str = ""
    """A line for the user who starts a run, if there is something to say."""

    def __init__(
        self, config: PrototypeHeadConfig, *, num_prototypes: int, dim: int, comm: Comm, seed: int
    ) -> None:
        size = config.group_size or comm.world_size
        if comm.world_size % size:
            raise ConfigError(
                f"group_size {size} does not divide {comm.world_size} ranks; use a divisor, or 0"
            )
        self.config = config
        self.num_prototypes = num_prototypes
        self.world = comm
        self.comm, self._replicas = comm.grid(size)
        """The ranks that share one table: what losses of `active` rows need."""
        self.gather_dtype = torch.float16 if comm.device.type == "cuda" else None
        """In which features travel: halves where the kernels make halves of them anyway."""
        self._first, self._last = self.comm.row_range(num_prototypes)
        self._seed = seed
        self._optimizer = row_optimizer(
            self._initial_rows(dim), config, first=self._first, seed=seed
        )
        self._touched: Touched | None = None
        self._gradient: Tensor | None = None
        self._counts = (0, 0)
        self._seen: Tensor | None = None
        self._norm = torch.zeros((), device=comm.device)

    @property
    def rows(self) -> Float[Tensor, "local dim"]:
        """This rank's rows as they are stored; compared as directions."""
        return self._optimizer.rows

    @property
    def row_range(self) -> tuple[int, int]:
        """Which rows of the whole table these are: [first, last)."""
        return self._first, self._last

    def active(self, labels: Int64[Tensor, "batch labels"], step: int) -> ActiveRows:
        """The rows of this rank that a step needs, given the labels of this rank's samples.

        -1 stands for no label. Equally many labels on all ranks. Where gradients are recorded the
        rows are a leaf, whose gradient `after_step` uses. DataError on all ranks if one has a
        label that is no row of the table; on a GPU from `gradients_finite`, before anything moves.
        """
        active = self._negatives_and_positives(labels, step)
        places = None if active.num_negatives == len(self.rows) else active.ids - self._first
        rows = self._take(places)
        self._counts = (active.num_negatives, len(active.ids))
        return active.of(rows)

    def active_each(self, labels: Int64[Tensor, "batch labels"], step: int) -> list[ActiveRows]:
        """As `active`, for each column of labels a sample of negatives of its own.

        The leaf holds the rows that any column needs; what is returned is taken from it.
        """
        columns = enumerate(labels.split(1, dim=1))
        each = [self._negatives_and_positives(column, step, slot=slot) for slot, column in columns]
        ids = torch.cat([active.ids for active in each]).unique()
        rows = self._take(None if len(ids) == len(self.rows) else ids - self._first)
        negatives = torch.cat([active.ids[: active.num_negatives] for active in each]).unique()
        self._counts = (len(negatives), len(ids))
        return [
            active.of(rows[torch.searchsorted(ids, active.ids).to(rows.device)]) for active in each
        ]

    def _negatives_and_positives(
        self, labels: Tensor, step: int, slot: int | None = None
    ) -> _Chosen:
        positives = self._own_positives(labels)
        ids, num_negatives = self._active_ids(positives, step, slot)
        return _Chosen(ids, num_negatives, self._bias(ids[:num_negatives], positives))

    def _take(self, places: Places) -> Tensor:
        """These rows, on the device: the leaf of the step where gradients are recorded."""
        rows = self._optimizer.taken(places).to(self.comm.device)
        if torch.is_grad_enabled():
            self._touched = Touched(rows.requires_grad_(), places)
        return rows

    def gradients_finite(self) -> bool:
        """Whether this rank's gradient is. Makes it that of the objective, the mean of all ranks'
        losses: sums it over the copies of the table, and divides by the number of ranks."""
        if self._touched is None or self._touched.leaf.grad is None:
            self._gradient = None
            return True
        gradient, self._touched.leaf.grad = self._touched.leaf.grad, None
        if self._replicas.world_size > 1:
            gradient = self._replicas.sum(gradient)
        self._gradient = gradient = gradient.div_(self.world.world_size)
        finite = torch.isfinite(torch.linalg.vector_norm(gradient))
        if self._seen is None or self._seen.device.type == "cpu":
            return bool(finite)
        wrong = (self._seen >= self.num_prototypes).any()
        is_finite, is_wrong = torch.stack([finite, wrong]).tolist()  # the host waits once
        if is_wrong:
            self._refuse_wrong()
        return bool(is_finite)

    def after_step(self, step: int, *, applied: bool, learning_rate_factor: float) -> None:
        """Update the touched rows by the gradient that `gradients_finite` looked at."""
        if applied and self._touched is not None and self._gradient is not None:
            gradient = self._clipped(self._gradient).to(self.rows.device)
            self._optimizer.update(self._touched.places, gradient, factor=learning_rate_factor)
        self._touched = self._gradient = None

    def figures(self) -> dict[str, Float[Tensor, ""]]:
        """Over all ranks: rows that the last `active` compares with, rows that the step moves, and
        the norm of the step before's gradient ahead of clipping. Every rank must call it."""
        counts = self.comm.sum(torch.tensor(self._counts, device=self.comm.device))
        names = ("active_rows", "touched_rows")
        values = dict(zip(names, counts.float(), strict=True))
        return {**values, "head_gradient_norm": self._norm}

    # -- state ----------------------------------------------------------------------------------

    def state_share(self) -> Iterator[tuple[str, Tensor]]:
        """Rows, moments and counts of this rank's range, in pieces; of the first copy only."""
        if self._replicas.is_main:
            yield from row_pieces(self._fields(), first=self._first)
        if self.world.is_main:
            yield "log_decay", torch.tensor(self._optimizer.log_decay, dtype=torch.float64)
            yield "gradient_norm", self._norm.cpu()  # a step late, so the next line needs it
            yield "seed", torch.tensor(self._seed)
            yield "shape", torch.tensor([self.num_prototypes, self.rows.shape[1]])
            if self.config.rows != "float32":
                yield HALF_ROWS, torch.tensor(True)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        found, own = state["shape"].tolist(), [self.num_prototypes, self.rows.shape[1]]
        if found != own:
            raise CheckpointError(
                f"the checkpoint's head has {found[0]} prototypes of {found[1]} numbers, this one "
                f"{own[0]} of {own[1]}"
            )
        if (HALF_ROWS in state) != (self.config.rows != "float32"):
            kept, asked = ("bfloat16", "float32")[:: 1 if HALF_ROWS in state else -1]
            raise CheckpointError(
                f"the checkpoint's head has rows in {kept}, and head.rows asks for {asked}; go on "
                f"with head.rows={kept}"
            )
        fill_rows(self._fields(), state, first=self._first)
        self._optimizer.log_decay = float(state["log_decay"])
        self._seed = int(state["seed"])
        if isinstance(self._optimizer, HalfRowOptimizer):
            self._optimizer.seed = self._seed
        self._norm = state["gradient_norm"].to(self.comm.device)

    def _fields(self) -> dict[str, Tensor]:
        held = self._optimizer
        return {"rows": held.rows, **held.moments, "steps": held.steps, "paid_decay": held.paid}

    # -- inside ---------------------------------------------------------------------------------

    def _initial_rows(self, dim: int) -> Tensor:
        deviation, (first, last) = self.config.init_deviation, (self._first, self._last)
        if self.config.init == "normal":
            rows = normal_rows(first, last, dim, deviation=deviation, seed=self._seed)
        else:
            shape = (self.num_prototypes, dim)
            rows = stored_rows(self.config.init, first, last, shape=shape, deviation=deviation)
        rows = rows.to(getattr(torch, self.config.rows))
        if not self.config.offload:
            return rows.to(self.comm.device)
        return rows.pin_memory() if self.comm.device.type == "cuda" else rows

    def _own_positives(self, labels: Tensor) -> Bool[Tensor, " local"]:
        """Which of this rank's rows are a positive of some sample of any rank."""
        everyones = self.world.all_gather(labels).flatten()
        self._seen = everyones
        if everyones.device.type == "cpu":
            self._refuse_wrong()
        own, count = everyones - self._first, len(self.rows)
        beside = torch.where((own >= 0) & (own < count), own, count)
        is_positive = torch.zeros(count + 1, dtype=torch.bool, device=own.device)
        return is_positive.index_fill_(0, beside, True)[:-1].to(self.rows.device)

    def _refuse_wrong(self) -> None:
        """DataError for labels that are no row. All ranks have seen the same."""
        assert self._seen is not None
        wrong = self._seen >= self.num_prototypes
        if bool(wrong.any()):
            raise DataError(
                f"{int(wrong.sum())} labels are not below the number of prototypes, "
                f"{self.num_prototypes}; the largest is {int(self._seen.max())}"
            )

    def _active_ids(
        self, is_positive: Tensor, step: int, slot: int | None = None
    ) -> tuple[Tensor, int]:
        """Negatives, then what else is a positive; and how many negatives there are."""
        if self.config.sample_rate >= 1:  # how many these are is known
            return torch.arange(self._first, self._last, device=self.rows.device), len(self.rows)
        sampled = sampled_rows(
            self._first,
            self._last,
            rate=self.config.sample_rate,
            sampling=self.config.sampling,
            seed=self._seed,
            step=step,
            slot=slot,
            device=self.rows.device,
        )
        if self.config.union_positives:
            negatives = places(sampled | is_positive, self._first)
            return negatives, len(negatives)
        negatives = places(sampled, self._first)
        others = places(is_positive & ~sampled, self._first)
        return torch.cat([negatives, others]), len(negatives)

    def _bias(self, negatives: Tensor, is_positive: Tensor) -> Tensor | None:
        """-ln(probability of being a negative), which is one for a row that had to be."""
        rate = self.config.sample_rate
        if not self.config.logq or rate in {0, 1}:
            return None
        dtype = torch.promote_types(self.rows.dtype, torch.float32)
        bias = self.rows.new_full((len(negatives),), -math.log(rate), dtype=dtype)
        if self.config.union_positives:
            bias = bias.masked_fill(is_positive[negatives - self._first], 0.0)
        return bias.to(self.comm.device)

    def _clipped(self, gradient: Tensor) -> Tensor:
        square = torch.linalg.vector_norm(gradient).square()
        self._norm = self.comm.sum(square).sqrt()
        if self.config.clip_norm is None:
            return gradient
        return gradient.mul_((self.config.clip_norm / (self._norm + 1e-6)).clamp_max(1.0))
