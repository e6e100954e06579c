"""One YAML file describes a run; every key is checked, every default stands here.

`load_run(path, overrides)` reads YAML, applies dotted `key=value` overrides and validates.
`dump_run(config)` writes the resolved YAML back: `load_run(dump_run(c)) == c`.
A recipe's own keys are validated by the `Config` of its file (`trainer/recipes/<name>.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from trainer.config_errors import explain
from trainer.config_past import brought_up_to_date
from trainer.config_section import Fraction as Fraction
from trainer.config_section import Frozen as Frozen
from trainer.config_section import LocalPath as LocalPath
from trainer.config_section import MemberName as MemberName
from trainer.config_section import ModelPath as ModelPath
from trainer.config_section import OnlyWhere as OnlyWhere
from trainer.config_section import OnlyWith as OnlyWith
from trainer.config_section import PositiveInt as PositiveInt
from trainer.config_section import ShardSpec as ShardSpec
from trainer.config_section import split_set
from trainer.config_text import read_mapping
from trainer.errors import ConfigError
from trainer.prompt_templates import read_templates
from trainer.recipe_files import config_class, recipe_config


class ModelSection(Frozen):
    """What a model's section says to the program around it, whatever the model is."""

    image_size: PositiveInt
    """Pixels per side."""
    embed_dim: PositiveInt
    """Width of its features."""


_WHO_READS = {"head": "or use protoclip or mlcd", "bias": "or use siglip"}


class WordsConfig(Frozen):
    """How captions become tokens where no text tower says so."""

    length: PositiveInt = 32
    """Tokens of a caption, begin and end included."""
    vocabulary: PositiveInt | None = 4096
    """Size of the tokenizer that is trained on the corpus; null where one is given."""
    tokenizer: ModelPath | None = None
    """A folder with a tokenizer."""

    @model_validator(mode="after")
    def _one_source_of_words(self) -> WordsConfig:
        if (self.tokenizer is None) == (self.vocabulary is None):
            raise ValueError(
                "give either a `tokenizer`, with `vocabulary: null`, or a `vocabulary`"
            )
        return self


class RecipeConfig(Frozen):
    """A recipe's own section; each recipe's `Config` is one, with a `model` of its own."""

    name: str
    """The recipe's file in trainer/recipes/."""
    model: ModelSection
    reads: ClassVar[frozenset[str]] = frozenset()
    """Which optional parts of a model (`head`, `bias`) the method trains; others are refused."""

    @model_validator(mode="after")
    def _no_part_that_is_not_trained(self) -> RecipeConfig:
        for part in ("head", "bias"):
            if getattr(self.model, part, None) and part not in self.reads:
                raise ValueError(f"{self.name} trains no model.{part}; drop it, {_WHO_READS[part]}")
        return self

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        if cls.model_fields["model"].annotation is ModelSection:
            raise ConfigError(
                f"{cls.__module__}.{cls.__name__} declares no model; a recipe's Config needs one, "
                "as `model: TwoTowerConfig = TwoTowerConfig()`"
            )

    def stores(self) -> Sequence[Path]:
        """Embedding stores that images learn to lie beside, in the space of their vectors; texts
        of an evaluation must then be of the same teacher."""
        return ()

    def join(self, seed: int) -> Any:
        """What data workers read beside the images (`trainer.data.feed.Join`), if anything."""
        return None

    def prompted(self, tokenizer: Any) -> Any:
        """The tokenizer as the method reads texts: with a prompt around them, for example."""
        return tokenizer

    def words(self) -> WordsConfig | None:
        """How captions are cut for a method that reads them without a text tower, if it does."""
        return None

    def wanted_views(self) -> ViewsConfig:
        """The views of an image that the method reads; one where a recipe says nothing."""
        return ViewsConfig()


class Period(Frozen):
    """How often something is due: `1000 steps`, `2 epochs`, `30 min`, or `never`."""

    count: float
    unit: Literal["steps", "samples", "epochs", "min", "never"]

    def __str__(self) -> str:
        if self.unit == "never":
            return "never"
        count = int(self.count) if float(self.count).is_integer() else self.count
        return f"{count} {self.unit}"


_PERIOD = r"(\d+\.?\d*(?:e\+?\d+)?|\.\d+)\s*(steps?|samples?|epochs?|min)"


def _read_period(value: Any) -> Any:
    if isinstance(value, str):
        if value.strip() == "never":
            return Period.model_construct(count=math.inf, unit="never")
        match = re.fullmatch(_PERIOD, value.strip())
        if not match or not 0 < float(match[1]) < math.inf:
            raise ValueError(f"{value!r} is no period; write '1000 steps', '30 min' or 'never'")
        unit = match[2] if match[2] == "min" or match[2].endswith("s") else match[2] + "s"
        return Period.model_construct(count=float(match[1]), unit=unit)
    if isinstance(value, dict):
        return Period.model_construct(**value)
    return value


Every = Annotated[Period, BeforeValidator(_read_period)]
NEVER = Period.model_construct(count=math.inf, unit="never")


class AugmentConfig(Frozen):
    """Random views of an image. The defaults are ProtoCLIP's "light" set (arXiv 2206.10996)."""

    crop_scale: tuple[Fraction, Fraction] = (0.5, 1.0)
    """Share of the area that a random resized crop keeps, lowest and highest."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop, lowest and highest."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    jitter: Annotated[tuple[float, float, float, float], OnlyWith("jitter_probability")] = (
        0.8,
        0.8,
        0.8,
        0.2,
    )
    """Strength of brightness, contrast, saturation and hue changes."""
    jitter_probability: Fraction = 0.2
    """Share of the views whose colours are changed."""
    gray_probability: Fraction = 0.2
    """Share of the views that become gray."""
    blur_probability: Fraction = 0.2
    """Share of the views that are blurred."""
    blur_sigma: Annotated[tuple[float, float], OnlyWith("blur_probability")] = (0.1, 2.0)
    """Standard deviation of the blur at 224 pixels, lowest and highest; scales with the image."""
    solarize_probability: Fraction = 0.0
    """Of turning the bright half of the values of each channel upside down."""

    @field_validator("crop_scale", "crop_ratio", "blur_sigma")
    @classmethod
    def _lowest_first(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"{list(value)} must be the lowest and the highest, both above zero")
        return value


Geometry = Literal["independent", "covering", "as_published"]
"""How the crops of several views relate."""


class ViewsConfig(Frozen):
    """How many random views of each image a method reads, and how their crops relate."""

    count: PositiveInt = 1
    """Views in all. The first is `Batch.images`, the others are `Batch.views`."""
    geometry: Geometry = "independent"
    """`covering`: one more look at the image, without changes of colour, whose crop holds the crops
    of all views; `Batch.boxes` says where in it each of them lies. `as_published`: that of A-CLIP's
    code for two views, which misses a part of one in most cases."""
    augment: AugmentConfig | None = None
    """How the views behind the first are drawn; as `data.augment` says where None."""
    cover_scale: float = Field(default=1.0, gt=0, le=1.0)
    """Pixels per side of the covering look, as a share of the model's `image_size`."""


Weight = Annotated[float, Field(gt=0, le=1000)]
IMAGE_FIELDS = ("png", "jpg", "jpeg", "webp")


class CaptionConfig(Frozen):
    """Which text of a sample the text tower reads."""

    fields: tuple[str, ...] = Field(default=("txt",), min_length=1)
    """Members of a sample (`txt`, `caption`, `outputs.txt`: the file's name behind its first dot),
    else json keys, whose value is a text or a list of texts; each visit draws one field. Of a
    text with several lines, and of a list, a visit draws one."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Relative frequency of each field; equal where None."""

    @model_validator(mode="after")
    def _one_weight_per_field(self) -> CaptionConfig:
        if self.weights is not None and len(self.weights) != len(self.fields):
            raise ValueError(f"{len(self.weights)} weights for {len(self.fields)} caption fields")
        if self.weights is not None and not any(self.weights):
            raise ValueError("all weights are zero; give a field that is to be read one above it")
        return self


class NoiseConfig(Frozen):
    """Samples that get the texts and labels of others, to study what noise in pretraining does."""

    share: Fraction = 0.0
    """Of the samples; the same ones whatever is trained, in the order of a hash."""
    group_shards: Annotated[PositiveInt, OnlyWith("share")] = 8
    """Texts move within this many neighbouring shards, so reads stay near each other."""
    seed: Annotated[int, OnlyWith("share")] = 0
    """Of the choice; a larger share with the same seed holds the smaller one."""


class DataConfig(Frozen):
    """Where samples come from and how they are read."""

    train: ShardSpec
    """Shards: a path or URL with braces (`s3://b/{000..127}.tar`) or globs; a list of them (or one
    text, joined by `::`); or a mapping from the names of sets to them (`name=path` in a text). A
    set's name is part of its samples' identity, so that sets may have equal shard names. A table of
    pictures' paths and captions (`pairs.csv`, `.tsv`) is read as a shard is."""
    weights: Annotated[dict[str, Weight] | None, OnlyWhere("reader", "indexed")] = None
    """How often an epoch holds each sample of a set, by the set's name: 2 is twice, 0.5 every other
    one, in turns from epoch to epoch. Once where a set is not named."""
    reader: Literal["indexed", "webdataset"] = "indexed"
    """`indexed`: exact order and resume. `webdataset`: streams without an index (weaker)."""
    allow_pipe: Annotated[bool, OnlyWhere("reader", "webdataset")] = False
    """Let the webdataset reader run shell commands given as `pipe:` URLs."""
    epoch_samples: Annotated[PositiveInt | None, OnlyWhere("reader", "webdataset")] = None
    """Samples that count as an epoch for the webdataset reader, which can't count them itself."""
    workers: int = Field(default=0, ge=0)
    """Reader processes per rank. The batches do not depend on it."""
    cache_mib: int = Field(default=0, ge=0)
    """Memory per reader process for decoded images: data that fits is decoded once and not once an
    epoch. The batches do not depend on it."""
    window_shards: Annotated[PositiveInt, OnlyWhere("reader", "indexed")] = 8
    """Samples are shuffled within this many (permuted) shards, so reads stay sequential."""
    max_pixels: PositiveInt = 25_000_000
    """Larger images are refused before they are decoded."""
    bad_sample_budget: Fraction = 0.01
    """The run stops when more than this share of the samples read could not be used."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels."""
    augment: AugmentConfig = AugmentConfig()
    captions: CaptionConfig = CaptionConfig()
    noise: Annotated[NoiseConfig, OnlyWhere("reader", "indexed")] = NoiseConfig()
    images: tuple[MemberName, ...] = Field(default=IMAGE_FIELDS, min_length=1)
    """Members of a sample that are its picture, the first that it has: what stands behind the first
    dot of the file's name, as `jpg` or `input.jpg`. Where none is called just so, the only member
    that ends in one of them."""

    @model_validator(mode="after")
    def _weights_of_sets_that_there_are(self) -> DataConfig:
        names = {split_set(part.strip())[0] for part in self.train.split("::")} - {""}
        if unknown := sorted((self.weights or {}).keys() - names):
            raise ValueError(
                f"weights names the set {unknown[0]!r}, and train has "
                f"{'the sets ' + ', '.join(sorted(names)) if names else 'no set with a name'}; "
                "write train: {name: shards}"
            )
        return self


class OptimConfig(Frozen):
    """AdamW with a cosine schedule."""

    learning_rate: float = Field(default=5e-4, gt=0)
    """At the end of the warm-up; from there it falls by half a cosine to zero at the last step."""
    image_learning_rate: float | None = None
    """For the image tower, where it differs."""
    text_learning_rate: float | None = None
    """For the text tower, where it differs."""
    layer_decay: float = Field(default=1.0, gt=0, le=1.0)
    """The learning rate of a layer is this to the power of its depth below the top."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Share of the mean and of the mean square of gradients that stays, per step."""
    epsilon: float = 1e-6
    """Added to the root of the mean square that a step is divided by."""
    weight_decay: float = 0.2
    """Share of a weight that a step takes away, times the learning rate; matrices only."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate grows from zero, in a line."""
    clip_norm: float = Field(default=10.0, gt=0)
    """Global gradient norm, in units of the true gradient of the global batch."""


_OF_CLASSES = OnlyWhere("name", "zero_shot", "knn", "linear_probe", "ood", "long_tail")
_OF_PROMPTS = OnlyWhere("name", "zero_shot", "ood", "long_tail")
_OF_TEXTS = OnlyWhere("name", "zero_shot", "retrieval", "cross_lingual")
_OF_PAIRS = OnlyWhere("name", "retrieval", "cross_lingual")


class AverageConfig(Frozen):
    """A momentum copy of the trained weights, averaged after each step in float32."""

    momentum: float = Field(default=0.996, ge=0, le=1)
    """Share of the average that stays, at the first step."""
    final_momentum: float = Field(default=1.0, ge=0, le=1)
    """The same at the last step; from one to the other by half a cosine."""


Weights = Literal["trained", "averaged"]
"""Which weights of a run: as the last step left them, or their average over the steps."""


EvalName = Literal[
    "zero_shot",
    "retrieval",
    "cross_lingual",
    "knn",
    "linear_probe",
    "ood",
    "long_tail",
]
OodScore = Literal["msp", "energy", "ssd", "mahalanobis", "knn", "prototype"]
Frequency = Literal["text", "bag", "image", "joint"]


class EvalConfig(Frozen):
    """One evaluation: what, on which shards, how often, of which weights."""

    name: EvalName
    """What is measured: a file of trainer/evals/."""
    label: str
    """Name under which its numbers are logged."""
    data: ShardSpec
    """Shards to test on."""
    train: Annotated[ShardSpec | None, _OF_CLASSES] = None
    """Shards to fit on (knn, linear_probe, ood), or to take zero_shot's pixel floor from."""
    target: Annotated[str, _OF_CLASSES] = "concept"
    """json key whose values are the classes (not of retrieval and cross_lingual)."""
    every: Every = NEVER
    """The end of a run is always evaluated."""
    weights: Weights = "trained"
    """`averaged`: of the momentum copy that the run keeps (`average`)."""
    limit: PositiveInt | None = None
    """Use at most this many samples, chosen by hash of their id."""
    templates: Annotated[
        tuple[str, ...],
        _OF_PROMPTS,
        Field(min_length=1),
        BeforeValidator(read_templates, json_schema_input_type=tuple[str, ...] | str),
    ] = ("{}", "a picture of {}", "an icon of {}", "{} emoji")
    """Prompts of a class name (zero_shot, long_tail, ood with `logits: zero_shot`): a list with
    `{}` for it, a file with one a line, or a set by name (plain, pictures, photos, drawings)."""
    class_names: Annotated[LocalPath | None, OnlyWhere("name", "zero_shot")] = None
    """File with a class's name on each line, as `classnames.txt` of CLIP_benchmark's layout;
    `target` (`cls` there) is then the number of the line, from 0."""
    caption: Annotated[str, _OF_PAIRS] = "txt"
    """Which text of a sample is searched for: `txt` or a json key, as `long` (retrieval); the key
    that holds texts by language is `lang` (cross_lingual). Every item of a list, and every line of
    a text, is a caption of its own."""
    picture: Annotated[str, _OF_PAIRS] = "pix"
    """json key whose equal values say that samples show the same picture; of samples without it,
    those of equal bytes do (retrieval, cross_lingual)."""
    languages: Annotated[tuple[str, ...] | None, OnlyWhere("name", "cross_lingual")] = None
    """Of cross_lingual; all that the samples have where None."""
    text_store: Annotated[LocalPath | None, _OF_TEXTS] = None
    """Vectors of the texts, for a model that reads none (flame): of the samples' captions, for
    cross_lingual with `{}` where the language goes, for zero_shot of the classes' prompts."""
    text_vectors: Annotated[tuple[int, ...] | None, OnlyWith("text_store")] = None
    """Which vectors of a text in `text_store` are averaged; all where None."""
    outside: Annotated[dict[str, ShardSpec], OnlyWhere("name", "ood")] = Field(default={})
    """Shards of other kinds than `train` and `data`, by name: `{near: ..., far: ...}` (ood)."""
    scores: Annotated[tuple[OodScore, ...], OnlyWhere("name", "ood"), Field(min_length=1)] = (
        *("msp", "energy", "ssd", "mahalanobis", "knn", "prototype"),
    )
    """How alike the training set a sample is said to be (ood)."""
    logits: Annotated[Literal["probe", "zero_shot"], OnlyWhere("name", "ood")] = "probe"
    """Of msp and energy: of logistic regression on `train`, or of the prompts of its classes."""
    concepts: Annotated[LocalPath | None, OnlyWhere("name", "long_tail")] = None
    """Folder of `tools/concepts.py count`: how often captions name each class (long_tail)."""
    frequency: Annotated[Frequency, OnlyWhere("name", "long_tail")] = "text"
    """Which of its counts (long_tail)."""
    slices: Annotated[tuple[PositiveInt, PositiveInt], OnlyWhere("name", "long_tail")] = (
        100,
        10_000,
    )
    """From which frequency on a class is torso, and head; under them it is tail, at 0 unseen."""

    @model_validator(mode="after")
    def _fits_on_other_shards(self) -> EvalConfig:
        if self.name == "ood" and not self.outside:
            raise ValueError("ood needs `outside`, shards to tell from `data`, by name")
        if self.name == "long_tail" and self.concepts is None:
            raise ValueError("long_tail needs `concepts`, a folder of tools/concepts.py count")
        if self.slices[0] >= self.slices[1]:
            raise ValueError(f"slices {list(self.slices)} must ascend: torso begins below head")
        if self.name in ("knn", "linear_probe", "ood"):
            if self.train is None:
                raise ValueError(f"{self.name} needs `train`, shards to fit on")
            if self.train == self.data:
                raise ValueError("`train` and `data` are the same shards")
        return self

    @field_validator("templates")
    @classmethod
    def _room_for_a_name(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"template {template!r} has no {{}} for the class name")
        return templates


class RunConfig(Frozen):
    """A whole run."""

    workdir: LocalPath
    """Checkpoints, metrics and exports go here. A second start goes on from what is there."""
    seed: int = 0
    """Everything that is drawn (weights, order, views, captions) is a function of it."""
    steps: PositiveInt
    """Optimizer steps."""
    global_batch: PositiveInt
    """Samples per optimizer step over all ranks. It is the only batch size that matters."""
    micro_batch: PositiveInt | None = None
    """Samples per rank and forward pass; the whole share of a rank where None."""
    deepspeed: LocalPath = Path("ds_configs/zero3.json")
    """ZeRO stage, precision and offload. Batch sizes and clipping come from here instead."""
    gradient_checkpointing: bool = True
    """Keep only the inputs of blocks and compute the rest again backward: less memory, a third more
    time."""
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
    max_skipped_steps: int = Field(default=20, ge=0)
    """The run stops when this many steps in a row had a gradient that is not finite."""
    comm_timeout_seconds: float = Field(default=1800.0, gt=0)
    """Seconds that a rank waits for the others before it gives up."""
    hang_seconds: float = Field(default=600.0, gt=0)
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


def dump_run(config: RunConfig) -> str:
    """The resolved configuration as YAML; `parse_run(dump_run(c)) == c`."""
    values = config.model_dump(mode="json")
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
