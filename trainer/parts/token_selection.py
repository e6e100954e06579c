"""Image towers that read a part of an image's patches in training: the setting, and its part.

Patches are chosen before a step. Where scores decide, a momentum copy of the model looks at a crop
that covers all views of an image, without their changes of colour; it is a float32 average of the
trained weights that is divided over the ranks as the weights are. Evaluations read all patches.
A-CLIP, arXiv 2212.08653.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor

from trainer.config import (
    AverageConfig,
    Frozen,
    OnlyWhere,
    PositiveInt,
    ViewsConfig,
)
from trainer.data.crops import cover_size
from trainer.errors import ConfigError
from trainer.models.image_tower import ImageTower
from trainer.models.patches import (
    check_chosen_patches,
    check_class_attention,
    patches_per_side,
)
from trainer.models.token_selection import (
    KEPT,
    SCORES,
    Rounding,
    best_groups,
    drawn_groups,
    group_scores,
    look_at_cover,
    num_kept,
    patches_of,
    projected_scores,
)
from trainer.models.tower import Tower
from trainer.models.two_tower import TwoTower
from trainer.parts.averaged_weights import AveragedWeights
from trainer.recipe import Context, Part
from trainer.types import Batch

if TYPE_CHECKING:  # deepspeed is imported where it is wanted
    from trainer.engine.zero import Engine

Select = Literal["attentive", "inverse", "random", "none"]
_CHOOSES = OnlyWhere("select", "attentive", "inverse", "random")
_SCORED = OnlyWhere("select", "attentive", "inverse")


class TokensConfig(Frozen):
    """Which patches of an image the image tower reads in a step of training."""

    select: Select = "attentive"
    """`attentive`: those that the class token of a momentum copy attends to most; `inverse`: least;
    `random`: a draw, new for each visit; `none`: all of them."""
    keep: Annotated[float, _CHOOSES, Field(gt=0, le=1)] = 0.5
    """Share of the groups that is read."""
    rounding: Annotated[Rounding, _CHOOSES] = "floor"
    """Of the number of groups; `floor_plus_one` takes one more, as A-CLIP's code does."""
    group: Annotated[PositiveInt | None, _CHOOSES] = None
    """Patches a side of the squares that are kept or left together; 2 where scores decide, and 1
    for a draw, where None."""
    cover_scale: Annotated[float, _SCORED, Field(gt=0, le=1)] = 1.0
    """Pixels a side of the look that is scored, as a share of `image_size`; 0.5 costs a quarter."""

    @property
    def scores(self) -> bool:
        """Whether a copy has to look."""
        return self.select in ("attentive", "inverse") and self.keep < 1

    @property
    def chooses(self) -> bool:
        return self.select != "none" and self.keep < 1

    @property
    def group_size(self) -> int:
        return self.group or (1 if self.select == "random" else 2)


class SelectsTokens(Frozen):
    """Of a recipe whose image tower may read a part of the patches. Stands before `RecipeConfig`
    among the bases of a `Config`, because it knows better which views are wanted."""

    tokens: TokensConfig | None = None
    """Which patches of an image are read in training; all of them where None."""
    momentum_copy: AverageConfig = AverageConfig()
    """Of the weights that score patches, and that say what views should predict."""

    @property
    def needs_copy(self) -> bool:
        return self.tokens is not None and self.tokens.scores

    def wanted_views(self) -> ViewsConfig:
        return self.views_of(1)

    def views_of(self, count: int) -> ViewsConfig:
        """So many views, and a look that covers them where the copy needs one."""
        if not self.needs_copy:
            return ViewsConfig(count=count)
        scale = 1.0 if self.tokens is None else self.tokens.cover_scale
        return ViewsConfig(count=count, geometry="covering", cover_scale=scale)

    def knows_the_end(self) -> str | None:
        depends = self.needs_copy and self.momentum_copy.knows_the_end
        return "recipe.momentum_copy.final_momentum" if depends else None

    @model_validator(mode="after")
    def _no_copy_that_nobody_asks(self) -> SelectsTokens:
        if self.momentum_copy != AverageConfig() and not self.needs_copy:
            raise ValueError(
                "momentum_copy is not read where no scores select tokens; drop it, or set "
                "tokens.select to attentive and tokens.keep below 1"
            )
        return self


class Grid(NamedTuple):
    """The patches of a view, and how they are kept."""

    side: int
    """Patches in a row of the image."""
    group: int
    kept: int
    """Groups of each view that are read."""

    @property
    def groups(self) -> int:
        return (self.side // self.group) ** 2


class TokenSelection:
    """Chooses each step's patches; a Part, with the momentum copy where one is needed."""

    def __init__(
        self,
        config: TokensConfig,
        grid: Grid | None,
        *,
        views: int,
        seed: int,
        average: AveragedWeights | None,
    ) -> None:
        self._config, self._grid, self._views, self._seed = config, grid, views, seed
        self._average = average

    def attach(self, engine: Engine) -> None:
        self._engine = engine
        if self._average is not None:
            self._average.attach(engine)

    def prepared(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches with the patches to keep, and with what else the copy says of the cover."""
        if self._average is None:
            return [_with(batch, self._chosen(batch)) for batch in batches]
        with self._average.applied():
            looks = [self._engine.encode(look_at_cover(batch)).tensors() for batch in batches]
        return [
            _with(batch, self._chosen(batch, said.pop(SCORES)) | said)
            for batch, said in zip(batches, map(dict, looks), strict=True)
        ]

    def gradients_finite(self) -> None:
        return None

    def after_step(self, step: int, *, applied: bool, learning_rate_factor: float) -> None:
        if self._average is not None:
            self._average.after_step(
                step, applied=applied, learning_rate_factor=learning_rate_factor
            )

    def state_share(self) -> Iterator[tuple[str, Tensor]]:
        return iter(()) if self._average is None else self._average.state_share()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self._average is not None:
            self._average.load_state_dict(state)

    def _chosen(
        self, batch: Batch, scores: Float[Tensor, "batch patches"] | None = None
    ) -> dict[str, Int64[Tensor, "batch views kept"]]:
        grid = self._grid
        if grid is None:
            return {}
        if self._config.select == "random":
            assert batch.epoch is not None
            groups = drawn_groups(
                *(batch.sample_id, batch.epoch),
                views=self._views,
                groups=grid.groups,
                count=grid.kept,
                seed=self._seed,
            )
        else:
            assert scores is not None
            assert batch.boxes is not None
            groups = self._ranked(scores, batch.boxes, grid)
        return {KEPT: patches_of(groups, side=grid.side, group=grid.group)}

    def _ranked(self, scores: Tensor, boxes: Tensor, grid: Grid) -> Tensor:
        """By the mean score of a group; scores of a coarse look are read at the groups' centres."""
        coarse = scores.shape[1] < grid.side**2
        side = grid.side // grid.group if coarse else grid.side
        values = projected_scores(scores.float(), boxes, side=side)
        values = values if coarse else group_scores(values, grid.group)
        return best_groups(values, grid.kept, lowest=self._config.select == "inverse")


def token_parts(
    config: SelectsTokens, context: Context, model: TwoTower | ImageTower, *, views: int = 1
) -> dict[str, Part]:
    """The part that chooses patches for the model's image tower, by its name; none where all are
    read and no copy is needed.

    ConfigError where the tower can't be asked to read some of its patches, or to score them.
    """
    tokens = config.tokens or TokensConfig(select="none")
    if not (tokens.chooses or config.needs_copy):
        return {}
    tower, image_size = model.image, model.config.image_size
    grid = _grid(tokens, tower, image_size) if tokens.chooses else None
    if config.needs_copy:
        cover = ViewsConfig(cover_scale=tokens.cover_scale)
        _check_cover(tower, cover_size(image_size, cover), scored=tokens.scores)
    average = (
        AveragedWeights(config.momentum_copy, steps=context.steps) if config.needs_copy else None
    )
    part = TokenSelection(tokens, grid, views=views, seed=context.seed, average=average)
    return {"tokens": part}


def _grid(tokens: TokensConfig, tower: Tower, image_size: int) -> Grid:
    side, group = patches_per_side(tower.backbone, image_size), tokens.group_size
    if side % group:
        raise ConfigError(
            f"tokens.group is {group}, which does not divide the {side} patches a side of "
            f"{image_size} pixels; use {_divisors(side)}"
        )
    check_chosen_patches(tower.backbone, image_size)
    grid = Grid(side, group, num_kept((side // group) ** 2, tokens.keep, tokens.rounding))
    if grid.kept == grid.groups:
        raise ConfigError(
            f"tokens.keep={tokens.keep} of {grid.groups} squares of {group} x {group} patches is "
            "all of them, so nothing would be left out; make tokens.keep or tokens.group smaller, "
            "or set tokens.select=none"
        )
    return grid


def _check_cover(tower: Tower, size: int, *, scored: bool) -> None:
    try:
        patches_per_side(tower.backbone, size)
    except ConfigError as error:
        raise ConfigError(f"the look of the copy (tokens.cover_scale): {error}") from error
    if scored:
        check_class_attention(tower.backbone, size)


def _divisors(side: int) -> str:
    return " or ".join(str(n) for n in range(1, side + 1) if side % n == 0 and n < side)


def _with(batch: Batch, more: Mapping[str, Tensor]) -> Batch:
    return batch._replace(more={**(batch.more or {}), **more}) if more else batch
