"""What a recipe is: one file in `trainer/recipes/` with a `Config` and a `Recipe`.

The file's name is the key in YAML. Nothing is registered and recipes never import each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import DataConfig
from trainer.data.labels import ClusterLabels
from trainer.errors import ConfigError
from trainer.models.model import Model
from trainer.settings.recipe_files import recipe_module
from trainer.stop import Check, go_on
from trainer.types import Batch, Features, Losses, NamedTensors, Progress, TowerName

Encode = Callable[[Batch], Features]
"""Forward without gradient, in evaluation mode. Every rank must call it equally often."""


class Context(NamedTuple):
    """What a recipe is built from besides its own configuration."""

    comm: Comm
    text_tokenizer: PreTrainedTokenizerFast | None
    """None where the model of the configuration reads no text."""
    seed: int
    global_batch: int
    steps: int
    workdir: Path
    data: DataConfig
    shape: Mapping[str, Any] | None = None
    """Of a model that has changed its shape since its run began: what `ChangesShape.shape` said
    when it was saved. None: as the configuration says."""
    check: Check = go_on
    """For what takes long and calls no `Encode`, as a clustering: between its passes a stop is
    looked at. All ranks must call it equally often."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, for a recipe that can't do without; a ConfigError where there is none."""
        if self.text_tokenizer is None:
            raise ConfigError("this recipe reads texts, and its model has no text tower")
        return self.text_tokenizer


@runtime_checkable
class Samples(Protocol):
    """What a phase may ask of the training stream."""

    def view(
        self, start: int, count: int, *, purpose: str, all_views: bool = False
    ) -> Iterable[Batch]:
        """This rank's share of samples [start, start + count) of the run's order, augmented.

        One view of each image, or all that the recipe wants where `all_views` are asked for.

        `purpose` is hashed into the augmentation's randomness, so that a pass over samples that
        will be trained on later sees other views of them. Every rank gets equally many batches;
        rows that only fill up have a sample id of -1.
        """
        ...


@runtime_checkable
class Part(Protocol):
    """State that ZeRO must not own: a sharded head, episode tables, an average of weights."""

    def gradients_finite(self) -> bool | None:
        """Whether this rank's gradients of the step are; None from a part that never has any.

        Asked after the backward pass. If one rank says no, no rank steps anything.
        """
        ...

    def after_step(self, step: int, *, applied: bool, learning_rate_factor: float) -> None:
        """Update what has gradients, if the engine applied the step; forget the gradients."""
        ...

    def state_share(self) -> NamedTensors:
        """This rank's part of the state, in global rows, by names that no other rank gives."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the shares of all ranks that saved, of which there may have been another
        number. A tensor is read from disk when it is asked for."""
        ...


@runtime_checkable
class FollowsWeights(Protocol):
    """A part that needs the engine, once it is there: an average of weights, for example."""

    def attach(self, engine: Any) -> None:
        """Called once, after the engine is made and before anything is restored."""
        ...


@runtime_checkable
class ChangesShape(Protocol):
    """A recipe whose model changes in the middle of a run (by `Engine.rebuild`, in a phase)."""

    def shape(self) -> Mapping[str, Any] | None:
        """What `build_model(..., shape=)` and `Context.shape` need to make the model of now; it
        must survive JSON. None: the model is still that of the configuration."""
        ...


@runtime_checkable
class NamesPhases(Protocol):
    """A recipe whose phases have another name than `episode`, in events and curves."""

    phase_name: str


@runtime_checkable
class PreparesBatches(Protocol):
    """A part that adds something to the batches of a step before any of them is run."""

    def prepared(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same samples with `Batch.more`. All ranks call it, with equally many batches."""
        ...


@runtime_checkable
class Recipe(Protocol):
    """A method: a model for ZeRO, parts beside it, and a loss."""

    model: Model
    parts: Mapping[str, Part]

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        """Loss terms of this rank's rows; each is the mean over them."""
        ...

    def locked_towers(self, progress: Progress) -> Collection[TowerName]:
        """Towers that the next step must not move."""
        ...

    def phase_due(self, progress: Progress) -> bool: ...

    def begin_phase(
        self, progress: Progress, encode: Encode, samples: Samples
    ) -> Mapping[str, Any]:
        """Prepare the next stretch of training (an episode); returns figures to log.

        `encode` and `Context.check` raise `Stopped` when the run is asked to stop, and the phase
        begins anew with the next start: change parts only after the last call of either.
        """
        ...

    def shown_groups(self) -> ClusterLabels | None:
        """Groups of training images to draw a picture of, if there are any now."""
        ...


class WithoutPhases:
    """The answers of a recipe that trains in one stretch, locks nothing and shows no groups."""

    def locked_towers(self, progress: Progress) -> Collection[TowerName]:
        return ()

    def phase_due(self, progress: Progress) -> bool:
        return False

    def begin_phase(
        self, progress: Progress, encode: Encode, samples: Samples
    ) -> Mapping[str, Any]:
        return {}

    def shown_groups(self) -> ClusterLabels | None:
        return None


def load_recipe(config: Any, context: Context) -> Recipe:
    """Build the recipe that `config.name` names."""
    recipe: Recipe = recipe_module(config.name).Recipe(config, context)
    return recipe


def build_model(
    config: Any,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm,
    *,
    seed: int,
    shape: Mapping[str, Any] | None = None,
) -> Model:
    """The model that the recipe of `config` trains, as it is before the first step; where a
    checkpoint says a `shape`, in that shape."""
    build = getattr(recipe_module(config.name), "build_model", None)
    if build is None:
        raise ConfigError(
            f"trainer/recipes/{config.name}.py has no build_model(config, tokenizer, comm, seed=), "
            "so only training can make its model; let its Recipe call one"
        )
    changed = {} if shape is None else {"shape": shape}
    model: Model = build(config, tokenizer, comm, seed=seed, **changed)
    return model


def attach_parts(recipe: Recipe, engine: Any) -> None:
    """Show the engine to the parts that follow its weights, and to a recipe that changes it."""
    for follower in (recipe, *recipe.parts.values()):
        if isinstance(follower, FollowsWeights):
            follower.attach(engine)


def prepared(recipe: Recipe, batches: Sequence[Batch]) -> Sequence[Batch]:
    """A step's batches with what the recipe's parts add to them."""
    for part in recipe.parts.values():
        if isinstance(part, PreparesBatches):
            batches = part.prepared(batches)
    return batches


def every_nth(state: Mapping[str, Tensor], comm: Comm) -> dict[str, Tensor]:
    """This rank's share of a state that all ranks know."""
    return {name: state[name] for name in sorted(state)[comm.rank :: comm.world_size]}
