"""A study in a file: recipes x sizes x data x budgets x seeds, each cell one training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from trainer.config import Frozen, LocalPath, PositiveInt, RunConfig, load_run
from trainer.data.remote import expand_shards
from trainer.errors import ConfigError
from trainer.scaling.fit import DELTA, RESAMPLES
from trainer.scaling.forms import FormName
from trainer.scaling.frontier import Frontier
from trainer.settings.errors import explain
from trainer.settings.text import read_mapping


class FitConfig(Frozen):
    """Which laws are fitted to the cells that are done, and to which of them."""

    laws: tuple[FormName, ...] = ("power", "floor")
    """Of each recipe's curve."""
    frontier: Frontier = "pareto"
    """`all` runs, those that nothing cheaper beats, or the best of each doubling of compute."""
    delta: float = Field(default=DELTA, gt=0)
    """Log errors further off than this pull no harder."""
    resamples: PositiveInt = RESAMPLES
    """Draws of the bootstrap."""
    held_out_decades: float = Field(default=1.0, gt=0)
    """Compute at the end that a second fit does not see, in factors of ten."""


class Study(Frozen):
    """A grid of trainings that differ in method, size, data and budget."""

    workdir: LocalPath
    """Cells train in folders below it; the table of points and the page stand in it."""
    base: LocalPath
    """The run that all cells share."""
    shared: tuple[str, ...] = ()
    """Overrides of all cells, `key=value`."""
    recipes: dict[str, tuple[str, ...]] = Field(min_length=1)
    """Overrides of each method, by its name."""
    models: dict[str, tuple[str, ...]] = Field(min_length=1)
    """Overrides of each step of the ladder, by its name."""
    data: Mapping[str, tuple[str, ...]] = Field(default={"all": ()})
    """Overrides of each amount of data; `nested_shards` makes them where it is given."""
    nested_shards: dict[str, PositiveInt] = Field(default={})
    """Amounts of data as numbers of the base run's shards, by name: the first so many in the order
    of a hash of their names, so that a smaller set is inside every larger one."""
    unique_samples: dict[str, PositiveInt] = Field(default={})
    """Different samples of each amount of data; needed by laws that know repeated ones."""
    samples_seen: tuple[PositiveInt, ...] = Field(min_length=1)
    """Budgets: samples that a training sees, repeated ones as often as they are."""
    seeds: tuple[int, ...] = (0,)
    """One training each."""
    cooldown: float | None = Field(default=None, gt=0, lt=1)
    """Share of a budget over which the learning rate falls to zero behind a constant one. The
    budgets of one model, data and seed are then cool-downs that begin from checkpoints of one run,
    each equal to a training of its own. Where None each is one, with a cosine."""
    corpus: str = "corpus"
    """Name of where the samples come from; curves of different corpora are not fitted together."""
    evaluation: str
    """Label of the evaluation in the base run that gives a cell's error."""
    figure: str = "top1"
    """Its number, in percent; the error is 1 - figure / 100."""
    at_a_time: PositiveInt = 1
    """Cells that run beside each other on this machine."""
    launcher: tuple[str, ...] = ()
    """In front of the trainer: `[deepspeed, --hostfile, hosts, --module]`, for example; plain
    Python where empty."""
    fit: FitConfig = FitConfig()

    @model_validator(mode="after")
    def _known_sets(self) -> Study:
        if unknown := sorted(set(self.unique_samples) - set(self.data) - set(self.nested_shards)):
            raise ValueError(f"unique_samples names {unknown[0]!r}, and data has no such entry")
        if list(self.samples_seen) != sorted(set(self.samples_seen)):
            raise ValueError("samples_seen must grow from one budget to the next")
        if self.nested_shards and self.data != {"all": ()}:
            raise ValueError("give either data, overrides by name, or nested_shards, their numbers")
        for section in (self.recipes, self.models, self.data, self.nested_shards):
            for name in section:
                if not name or set(name) & set("/\\ ") or name.startswith("."):
                    raise ValueError(f"{name!r} names a folder; use letters, digits, - and _")
        return self


class Trunk(Frozen):
    """The run at a constant rate that cells of several budgets begin from."""

    workdir: Path
    step: int
    """Of the checkpoint that a cell begins from."""
    overrides: tuple[str, ...]
    """Of the base run, to get there."""


class Cell(Frozen):
    """One training of the grid."""

    recipe: str
    model: str
    data: str
    samples: int
    """Budget."""
    seed: int
    workdir: Path
    overrides: tuple[str, ...]
    """Of the base run."""
    steps: int
    trunk: Trunk | None = None

    @property
    def chain(self) -> str:
        """What cells of several budgets share a trunk by; a cell's own name where it has none."""
        if self.trunk is None:
            return self.name
        return f"{self.recipe}/{self.model}/{self.data}/seed-{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.model}/{self.data}/{self.samples}/seed-{self.seed}"

    def config(self, study: Study) -> RunConfig:
        """What it trains. ConfigError where the overrides do not fit."""
        return load_run(study.base, self.overrides)


def load_study(path: Path) -> Study:
    """ConfigError with the key where the file is no study."""
    try:
        values: Mapping[str, object] = read_mapping(
            path.read_text(encoding="utf-8"), (), source=str(path)
        )
        return Study.model_validate(values)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Study)}") from error


def cells(study: Study) -> list[Cell]:
    """All of a study, cheapest budgets first, seed by seed. ConfigError where no step fits."""
    base = load_run(study.base, study.shared)
    if study.samples_seen[0] < base.global_batch:
        raise ConfigError(
            f"samples_seen has {study.samples_seen[0]}, less than one global batch of "
            f"{base.global_batch}; give more"
        )
    amounts = _amounts(study, base)
    return [
        _cell(study, samples, seed, (recipe, model, data), overrides, base.global_batch)
        for samples in study.samples_seen
        for seed in study.seeds
        for recipe, of_recipe in study.recipes.items()
        for model, of_model in study.models.items()
        for data, of_data in amounts.items()
        for overrides in [(*study.shared, *of_recipe, *of_model, *of_data)]
    ]


def _cell(
    study: Study,
    samples: int,
    seed: int,
    names: tuple[str, str, str],
    overrides: tuple[str, ...],
    batch: int,
) -> Cell:
    recipe, model, data = names
    steps = samples // batch
    workdir = study.workdir / "cells" / recipe / model / data / f"{samples}/seed-{seed}"
    own = [f"steps={steps}", f"seed={seed}", f"workdir={workdir}"]
    trunk = None
    if study.cooldown is not None:
        begins = steps - max(1, round(study.cooldown * steps))
        if begins < 1:
            raise ConfigError(
                f"cooldown {study.cooldown} leaves no step before it of the {steps} that "
                f"{samples} samples make; give a larger budget or a smaller share"
            )
        place = study.workdir / "trunks" / recipe / model / data / f"seed-{seed}"
        shared = ("optim.schedule=constant", f"seed={seed}")
        longer = (f"steps={begins}", f"workdir={place}", "evals=[]")
        trunk = Trunk(workdir=place, step=begins, overrides=(*overrides, *shared, *longer))
        own += ["optim.schedule=constant", f"optim.cooldown_steps={steps - begins}"]
    return Cell(
        recipe=recipe,
        model=model,
        data=data,
        seed=seed,
        workdir=workdir,
        samples=steps * batch,
        steps=steps,
        overrides=(*overrides, *own),
        trunk=trunk,
    )


def _amounts(study: Study, base: RunConfig) -> Mapping[str, tuple[str, ...]]:
    """Overrides of each amount of data. ConfigError where there are fewer shards than asked for."""
    if not study.nested_shards:
        return study.data
    names = expand_shards(base.data.train)
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    most = max(study.nested_shards.values())
    if most > len(ordered):
        raise ConfigError(
            f"nested_shards asks for {most} shards, and {base.data.train} has {len(ordered)}; name "
            "the shards themselves in the base run (a catalogue counts as one), or give each "
            "amount of data a catalogue of its own under `data`"
        )
    return {
        name: (f"data.train={json.dumps('::'.join(sorted(ordered[:count])))}",)
        if count < len(ordered)
        else ()
        for name, count in study.nested_shards.items()
    }
