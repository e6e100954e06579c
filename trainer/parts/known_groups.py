"""Groups of images that are known: a vendor, a camera, a licence, a day. To keep, or to remove.

A head learns to tell the groups from the features. Where a group is to be kept, features help it;
where it is to be removed, they get the reversed gradient, so that it can't be told any more. What
features feel is a share of what they feel of the other terms: norms over all ranks, averaged over
steps, are balanced. As FINO's guides (arXiv 2606.05107), with gradient reversal (arXiv 1409.7495).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field, field_validator
from torch import Tensor

from trainer.comm import Comm
from trainer.config import Frozen, OnlyWhere
from trainer.data.classes import named_classes
from trainer.data.labels import ClusterLabels
from trainer.errors import ConfigError
from trainer.losses.learned_prototypes import LogitOptions
from trainer.losses.margin import Margin
from trainer.losses.multilabel import MultilabelOptions
from trainer.losses.prototype_loss import prototype_loss
from trainer.losses.scaled_gradient import scaled_gradient
from trainer.parts.linear_head import (
    LinearHead,
    LinearHeadConfig,
    mean_cross_entropy,
    mean_squared_error,
)
from trainer.parts.prototype_head import PrototypeHead, PrototypeHeadConfig
from trainer.recipe import Context, Part, every_nth
from trainer.types import Batch, Losses

MEMORY = 0.9
"""Share of the mean squares of gradients that stays, per step."""


class GroupHeadConfig(PrototypeHeadConfig):
    """A row for each group."""

    sample_rate: float = Field(default=1.0, ge=0, le=1)
    """Share of the groups that a step compares with, besides those of its samples."""


class KnownGroupConfig(Frozen):
    """One json key of the shards, and what the features should make of it."""

    key: str = Field(min_length=1)
    """Its values are the groups; a sample without it is left out."""
    effect: Literal["keep", "remove"]
    """`keep`: features are to tell the groups apart. `remove`: they are not to."""
    told_by: Literal["prototypes", "linear", "value"] = "prototypes"
    """`prototypes`: a softmax over cosines with a learnable row for each group, divided over the
    ranks. `linear`: a softmax over a linear layer, on every rank. `value`: a linear layer that says
    a number, in standard deviations of the key's values, by squared error."""
    weight: float = Field(default=0.3, ge=0)
    """Norm of the gradient that features get from this group, as a share of that of all other
    terms; where not `balanced`, a factor. With 0 the head learns and features don't: its loss then
    says how much of the groups they hold."""
    balanced: bool = True
    """Whether `weight` is of norms."""
    scale: Annotated[float, OnlyWhere("told_by", "prototypes"), Field(gt=0)] = 16.0
    """Of cosines."""
    head: Annotated[GroupHeadConfig, OnlyWhere("told_by", "prototypes")] = GroupHeadConfig()
    layer: Annotated[LinearHeadConfig, OnlyWhere("told_by", "linear", "value")] = LinearHeadConfig()


class KnowsGroups(Frozen):
    """Of a recipe whose images may have known groups. Stands before `RecipeConfig` among the bases
    of a `Config`."""

    known_groups: tuple[KnownGroupConfig, ...] = ()
    """Groups that images are known to be of, to keep or to remove in the features."""

    @field_validator("known_groups")
    @classmethod
    def _a_key_once(cls, groups: tuple[KnownGroupConfig, ...]) -> tuple[KnownGroupConfig, ...]:
        keys = [group.key for group in groups]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"several known groups are of the key {twice[0]!r}; give it once")
        return groups


class KnownGroups:
    """The terms of all known groups; `parts` are what a recipe has to name."""

    def __init__(self, config: KnowsGroups, context: Context, *, dim: int) -> None:
        self._groups = [_Group(each, context, dim) for each in config.known_groups]
        self.parts: dict[str, Part] = {}
        for group in self._groups:
            self.parts[f"group_{group.config.key}"] = group.head
            self.parts[f"balance_{group.config.key}"] = group.balance

    def losses(self, rows: Float[Tensor, "batch dim"], batch: Batch, step: int) -> Losses:
        """A term `known_group/KEY` for each, in nats or squared deviations, of all ranks' samples.

        `rows` are the leaves that the recipe's other terms read too. A term's weight is one, since
        its head learns by it; what `rows` get of it is scaled on the way to them.
        """
        losses = Losses()
        for group in self._groups:
            losses = losses.with_term(
                f"known_group/{group.config.key}", group.loss(rows, batch, step)
            )
        return losses


class _Table(NamedTuple):
    labels: ClusterLabels
    num_groups: int
    numbers: Float[Tensor, " groups"] | None
    """Of `value`: each group's, in standard deviations from the mean over samples."""


class _Group:
    def __init__(self, config: KnownGroupConfig, context: Context, dim: int) -> None:
        self.config, self._comm = config, context.comm
        self._table = _table(config, context)
        self.balance = GradientBalance(config, context.comm)
        self.head: PrototypeHead | LinearHead
        if config.told_by == "prototypes":
            size = self._table.num_groups
            self.head = PrototypeHead(
                config.head, num_prototypes=size, dim=dim, comm=context.comm, seed=context.seed
            )
        else:
            outputs = 1 if config.told_by == "value" else self._table.num_groups
            self.head = LinearHead(config.layer, outputs=outputs, dim=dim, comm=context.comm)

    def loss(self, rows: Tensor, batch: Batch, step: int) -> Tensor:
        labels = self._table.labels.of(batch.sample_id)
        rows = self.balance.scaled(rows)
        if isinstance(self.head, PrototypeHead):
            return self._by_prototypes(self.head, rows, labels, step)
        said = self.head(rows)
        if self._table.numbers is None:
            return mean_cross_entropy(said, labels, self._comm)
        wanted = self._table.numbers[labels.clamp_min(0)]
        return mean_squared_error(said[:, 0], wanted, labels, self._comm)

    def _by_prototypes(
        self, head: PrototypeHead, rows: Tensor, labels: Int64[Tensor, " batch"], step: int
    ) -> Tensor:
        column = labels[:, None]
        active = head.active(column, step)
        logits = LogitOptions(scale=self.config.scale, gather_dtype=head.gather_dtype)
        options = MultilabelOptions("pfc_ce", Margin("cosine", 0.0), logits=logits)
        usual = -(-head.num_prototypes // head.comm.world_size)
        result = prototype_loss(rows, column, active, head.comm, options, usual_negatives=usual)
        return result.loss


class GradientBalance:
    """Norms of the gradients at the features: of one group's term, and of all others; a Part.

    The first step only measures. A step without a gradient, or one that is not applied, counts for
    nothing. Norms are of the steps before, so the factor is equal on all ranks and costs no wait.
    """

    def __init__(self, config: KnownGroupConfig, comm: Comm) -> None:
        self._comm = comm
        self._weight = config.weight if config.effect == "keep" else -config.weight
        self._balanced = config.balanced
        self.squares = torch.zeros(2, dtype=torch.float64, device=comm.device)
        """Mean squares of the norms of all other terms and of this one, as the head feels it."""
        self._rows: Tensor | None = None
        self._own: Tensor | None = None
        self._factor = torch.zeros((), device=comm.device)

    def scaled(self, rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """`rows`, which feel of what is made of the result a balanced share, or its reverse."""
        self._factor = self._now()
        if not rows.requires_grad:
            return rows
        result = scaled_gradient(rows, self._factor)
        self._rows, self._own = rows, None
        result.register_hook(self._remember)
        return result

    def _now(self) -> Tensor:
        if not self._balanced:
            return torch.full((), self._weight, device=self._comm.device)
        others, own = self.squares
        ratio = torch.where(own > 0, others / own, 0.0).sqrt()
        return (self._weight * ratio).float()

    def _remember(self, gradient: Tensor) -> None:
        self._own = gradient

    def gradients_finite(self) -> None:
        return None

    def after_step(self, step: int, *, applied: bool, learning_rate_factor: float) -> None:
        rows, own = self._rows, self._own
        if applied and rows is not None and rows.grad is not None and own is not None:
            others = rows.grad - self._factor.to(own.dtype) * own
            now = torch.stack([others.double().square().sum(), own.double().square().sum()])
            # Of the mean over ranks, of which a rank's rows feel their own samples' part.
            now = self._comm.sum(now) / self._comm.world_size**2
            self.squares = torch.where(
                now[1] > 0, MEMORY * self.squares + (1 - MEMORY) * now, self.squares
            )
        self._rows = self._own = None

    def state_share(self) -> dict[str, Tensor]:
        return every_nth({"squares": self.squares.cpu()}, self._comm)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.squares = state["squares"].to(self._comm.device)


def _table(config: KnownGroupConfig, context: Context) -> _Table:
    data, comm, key = context.data, context.comm, config.key
    labels, names = named_classes(data.train, key, comm, budget=data.bad_sample_budget)
    if len(names) < 2:
        raise ConfigError(
            f"recipe.known_groups: the json key {key!r} has {len(names)} values in {data.train}; "
            "name one that tells samples apart"
        )
    table = _Table(labels.beside(comm.device), len(names), None)
    if config.told_by != "value":
        return table
    try:
        numbers = torch.tensor([float(name) for name in names], dtype=torch.float64)
    except ValueError as error:
        raise ConfigError(
            f"recipe.known_groups: a value of {key!r} is no number ({error}); use told_by: "
            "prototypes or linear"
        ) from error
    counts = torch.bincount(labels.labels.long(), minlength=len(names)).cpu().double()
    return table._replace(numbers=_deviations(numbers, counts, key).to(comm.device))


def _deviations(numbers: Tensor, counts: Tensor, key: str) -> Float[Tensor, " groups"]:
    """How far each number is from the mean of all samples, in their standard deviations."""
    if not bool(torch.isfinite(numbers).all()):
        raise ConfigError(f"recipe.known_groups: a value of {key!r} is not finite; leave it out")
    shares = counts / counts.sum()
    mean = (shares * numbers).sum()
    return ((numbers - mean) / (shares * (numbers - mean).square()).sum().sqrt()).float()
