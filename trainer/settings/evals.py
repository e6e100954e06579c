"""What a model is measured by."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from trainer.prompt_templates import read_templates
from trainer.settings.optim import Weights
from trainer.settings.period import NEVER, Every
from trainer.settings.section import (
    Frozen,
    LocalPath,
    OnlyWhere,
    OnlyWith,
    PositiveInt,
    ShardSpec,
)

_OF_CLASSES = OnlyWhere("name", "zero_shot", "knn", "linear_probe", "ood", "long_tail")
_OF_PROMPTS = OnlyWhere("name", "zero_shot", "ood", "long_tail")
_OF_TEXTS = OnlyWhere("name", "zero_shot", "retrieval", "cross_lingual")
_OF_PAIRS = OnlyWhere("name", "retrieval", "cross_lingual")

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
    gap_to: Annotated[str | None, OnlyWhere("name", "zero_shot")] = None
    """Label of an earlier zero_shot evaluation, as of ImageNet before Let it Wag!: `gap` is its
    top1 less this one's."""
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
