"""A whole run: its keys, and its YAML in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from trainer.addresses import all_without_secrets
from trainer.errors import ConfigError
from trainer.settings.data import CaptionConfig, DataConfig
from trainer.settings.errors import explain
from trainer.settings.evals import EvalConfig
from trainer.settings.optim import AverageConfig, OptimConfig
from trainer.settings.past import brought_up_to_date
from trainer.settings.period import Every, Period
from trainer.settings.recipe import RecipeConfig
from trainer.settings.recipe_files import config_class, recipe_config
from trainer.settings.section import Frozen, LocalPath, PositiveInt
from trainer.settings.spikes import SpikesConfig
from trainer.settings.text import read_mapping

_WITHOUT_AN_END = {
    "optim.schedule": "optim.schedule: constant",
    "average.final_momentum": "it to the momentum at the first step",
    "recipe.locked_tail_episodes": "it to 0",
    "recipe.momentum_copy.final_momentum": "it to the momentum at the first step",
}
"""What makes the steps of a run those of a longer one."""


class RunConfig(Frozen):
    """A whole run."""

    workdir: LocalPath
    """Checkpoints, metrics and exports go here. A second start goes on from what is there."""
    seed: int = 0
    """Everything that is drawn (weights, order, views, captions) is a function of it."""
    steps: PositiveInt
    """Optimizer steps."""
    begin_from: LocalPath | None = None
    """A checkpoint's folder (`.../checkpoints/step-00001000`) of the same run in another workdir,
    from which this one goes on where its own has none yet; `optim.schedule` must be `constant`.
    What is free to change when a run goes on is so here, and the cool-down."""
    global_batch: PositiveInt
    """Samples per optimizer step over all ranks. It is the only batch size that matters."""
    micro_batch: PositiveInt | None = None
    """Samples per rank and forward pass; the whole share of a rank where None."""
    deepspeed: LocalPath = Path("ds_configs/zero3.json")
    """ZeRO stage, precision and offload. Batch sizes and clipping come from here instead."""
    gradient_checkpointing: bool = True
    """Keep only the inputs of blocks and compute the rest again backward: less memory, a third more
    time."""
    compile_blocks: bool = False
    """Let torch's compiler join the operations of each transformer block: a minute or more at the
    first step, and results that differ in their last bits. For ZeRO stages 0 to 2."""
    recipe: SerializeAsAny[RecipeConfig]
    """`name` is the recipe's file; its other keys are that file's `Config`."""
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    average: AverageConfig | None = None
    """A momentum copy of the trained weights beside them, for evaluations and exports that ask for
    `averaged` ones; 4 bytes a weight, divided as ZeRO divides the moments. None where None."""
    evals: tuple[EvalConfig, ...] = ()
    log_every: Every = Period.model_construct(count=10.0, unit="steps")
    """Between two lines of numbers."""
    log_term_gradients: bool = False
    """Log the norm of each loss term's gradient at the features too. Terms then go backward one by
    one, which may change the last bit of a gradient."""
    device_peak_tflops: float | None = Field(default=None, gt=0)
    """What one device can do, in 10^12 FLOPs per second, as its maker says for the run's precision;
    the share of it that a run uses is then logged."""
    wandb: str | None = Field(default=None, min_length=1)
    """Project of Weights & Biases that takes the same numbers (`pip install wandb`)."""
    save_every: Every = Period.model_construct(count=10.0, unit="min")
    """Between two checkpoints. The end of a run is always saved."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Two at least: the one before is the way back if the newest is damaged."""
    second_copy: LocalPath | None = None
    """A folder of this run alone, on another disk: every checkpoint is copied there and verified,
    and read from there where the one in the workdir is damaged or gone."""
    save_beside: bool = True
    """Training goes on while a checkpoint is written from a copy in the host's memory; else a step
    waits for the disk. The last save, and the one of a stop, always waits."""
    max_skipped_steps: int = Field(default=20, ge=0)
    """The run stops when this many steps in a row had a gradient that is not finite."""
    spikes: SpikesConfig | None = None
    """Go back where the loss jumps; the run goes on as it is where None."""
    comm_timeout_seconds: float = Field(default=1800.0, gt=0)
    """Seconds that a rank waits for the others before it gives up."""
    hang_seconds: float = Field(default=1800.0, gt=0)
    """Seconds without progress on some rank, whatever it does, after which all write the stacks of
    their threads to WORKDIR/stacks, the one that is behind is named, and the run ends."""

    @field_validator("recipe", mode="before")
    @classmethod
    def _recipe_reads_its_own_keys(cls, values: Any) -> Any:
        return recipe_config(values) if isinstance(values, Mapping) else values

    @field_validator("evals")
    @classmethod
    def _one_label_each(cls, evals: tuple[EvalConfig, ...]) -> tuple[EvalConfig, ...]:
        labels = [entry.label for entry in evals]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"several evaluations are labelled {', '.join(twice)}")
        return evals

    @field_validator("evals")
    @classmethod
    def _gaps_to_what_is_measured_with_them(
        cls, evals: tuple[EvalConfig, ...]
    ) -> tuple[EvalConfig, ...]:
        for place, entry in enumerate(evals):
            before = {e.label: e for e in evals[:place] if e.name == "zero_shot"}
            if entry.gap_to is None:
                continue
            other = before.get(entry.gap_to)
            if other is None or (other.every, other.weights) != (entry.every, entry.weights):
                raise ValueError(
                    f"gap_to of {entry.label} is {entry.gap_to!r}; name a zero_shot evaluation "
                    "that stands before it and has the same `every` and `weights`"
                )
        return evals

    @model_validator(mode="after")
    def _a_second_copy_elsewhere(self) -> RunConfig:
        if self.second_copy is not None and self.second_copy.is_relative_to(self.workdir):
            raise ValueError(
                f"second_copy {self.second_copy} is inside the workdir, with which it would be "
                "lost; name a folder on another disk"
            )
        return self

    @model_validator(mode="after")
    def _no_average_that_is_not_kept(self) -> RunConfig:
        wanting = [entry.label for entry in self.evals if entry.weights == "averaged"]
        if wanting and self.average is None:
            raise ValueError(
                f"evaluation {wanting[0]} is of averaged weights, and the run keeps no average; "
                "add `average: {}`, or drop `weights: averaged`"
            )
        return self

    @model_validator(mode="after")
    def _no_beginning_that_a_run_of_this_length_never_had(self) -> RunConfig:
        optim = self.optim
        falls = optim.warmup_steps + optim.cooldown_steps
        if optim.cooldown_steps and falls > self.steps:
            raise ValueError(
                f"warmup_steps and cooldown_steps are {falls} together, and the run has "
                f"{self.steps} steps; take fewer"
            )
        if self.begin_from is None:
            return self
        key = self.recipe.knows_the_end()
        if optim.schedule != "constant":
            key = "optim.schedule"
        elif self.average is not None and self.average.knows_the_end:
            key = "average.final_momentum"
        if key:
            raise ValueError(
                f"begin_from needs steps that don't depend on the length of the run, and those of "
                f"{key} do; set {_WITHOUT_AN_END[key]}"
            )
        return self

    @model_validator(mode="after")
    def _no_spikes_that_can_not_be_left_out(self) -> RunConfig:
        if self.spikes is None:
            return self
        if self.data.reader == "webdataset":
            raise ValueError(
                "spikes: the webdataset reader draws other samples after a start anew, so none can "
                "be left out; drop spikes, or use data.reader: indexed"
            )
        if getattr(self.recipe, "episode_samples", None) is not None:
            raise ValueError(
                f"spikes: an episode of {self.recipe.name} is clustered for the samples that it "
                "trains on, so none of them can be left out; drop spikes"
            )
        if self.spikes.window >= self.steps:
            raise ValueError(
                f"spikes.window is {self.spikes.window}, and the run has {self.steps} steps; none "
                "would be looked at"
            )
        return self

    @model_validator(mode="after")
    def _no_keys_of_a_tower_that_is_not_there(self) -> RunConfig:
        model = self.recipe.model
        for tower in ("image", "text"):
            section = getattr(model, tower, None)
            rate = f"optim.{tower}_learning_rate"
            if section is None and getattr(self.optim, f"{tower}_learning_rate") is not None:
                raise ValueError(f"{rate}: {self._model_has_no(tower)}; drop it")
        reads = getattr(model, "text", None) is not None or self.recipe.words() is not None
        if not reads and self.data.captions != CaptionConfig():
            raise ValueError(f"data.captions: {self._model_has_no('text')}; drop them")
        return self

    @model_validator(mode="after")
    def _no_pixels_beside_stored_features(self) -> RunConfig:
        if getattr(getattr(self.recipe.model, "image", None), "stored", None) is None:
            return self
        plain = DataConfig(train=self.data.train)
        for key in ("augment", "max_pixels", "background", "cache_mib"):
            if getattr(self.data, key) != getattr(plain, key):
                raise ValueError(
                    f"data.{key} is of pixels, and the model reads stored features; drop it"
                )
        if self.data.reader == "webdataset":
            raise ValueError("stored features are of indexed samples; use data.reader: indexed")
        return self

    def _model_has_no(self, tower: str) -> str:
        return f"the model of {self.recipe.name} has no {tower} tower that would read it"


def load_run(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `a.b=value` overrides (values are YAML too)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8 (byte {error.start})") from error
    return parse_run(text, overrides, source=str(path))


def parse_run(text: str, overrides: Sequence[str] = (), *, source: str = "YAML") -> RunConfig:
    values = brought_up_to_date(read_mapping(text, overrides, source=source))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        where = f"{source} with {' '.join(overrides)}" if overrides else source
        raise ConfigError(f"{where}: {_explain(error, values)}") from error


def dump_run(config: RunConfig, *, secrets: bool = True) -> str:
    """The resolved configuration as YAML; `parse_run(dump_run(c)) == c`.

    Without `secrets` its URLs have lost their passwords and signatures.
    """
    values = config.model_dump(mode="json")
    values = values if secrets else all_without_secrets(values)
    for section in [values, *values["evals"]]:
        for key, value in section.items():
            if isinstance(value, dict) and set(value) == {"count", "unit"}:
                section[key] = str(Period.model_construct(**value))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def micro_batches(
    *, global_batch: int, micro_batch: int | None, world_size: int
) -> tuple[int, int]:
    """(micro-batch per rank, micro-batches per step); a ConfigError where it does not divide."""
    unit = world_size * (micro_batch or 1)
    if global_batch % unit:
        lower, upper = global_batch // unit * unit, -(-global_batch // unit) * unit
        parts = f"{world_size} ranks" + (
            f" x micro-batches of {micro_batch}" if micro_batch else ""
        )
        ways = f"{lower} or {upper}" if lower else f"{upper}"
        raise ConfigError(f"global_batch {global_batch} is not divisible by {parts}; use {ways}")
    per_rank = global_batch // world_size
    return (micro_batch or per_rank), per_rank // (micro_batch or per_rank)


def _explain(error: ValidationError, values: Mapping[str, Any]) -> str:
    recipe = values.get("recipe")
    try:
        sections = {"recipe": config_class(recipe)} if isinstance(recipe, Mapping) else {}
    except ValueError:
        sections = {}  # the error says so itself
    return explain(error, RunConfig, sections=sections)
