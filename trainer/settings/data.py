"""Samples: where they come from, how they are read, and which views of them are drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from trainer.settings.section import (
    Fraction,
    Frozen,
    LocalPath,
    MemberName,
    OnlyWhere,
    OnlyWith,
    PositiveInt,
    ShardSpec,
    split_set,
)


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
    combine: Literal["draw", "concat"] = "draw"
    """`draw`: a visit reads one of the fields. `concat`: those that the sample has, in their order,
    joined by `; `."""
    weights: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...] | None, OnlyWhere("combine", "draw")
    ] = None
    """Relative frequency of each field; equal where None."""
    generated: LocalPath | None = None
    """A folder of tools/caption.py: its captions are the field `generated`, which a sample without
    one lacks."""

    @model_validator(mode="after")
    def _generated_captions_are_read(self) -> CaptionConfig:
        if (self.generated is None) != ("generated" not in self.fields):
            raise ValueError(
                "`generated`, a folder of captions, and the field `generated` go together: "
                "fields: [txt, generated]"
            )
        return self

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


class ShardCacheConfig(Frozen):
    """Where remote shards are kept while they are read."""

    folder: LocalPath
    """On a disk of each machine; its processes share it."""
    gib: float = Field(gt=0)
    """What it may hold, in GiB; the shards that were not opened for longest make room. At least the
    shards of two windows."""

    @property
    def bytes(self) -> int:
        return int(self.gib * 2**30)


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
    window_groups: Annotated[PositiveInt, OnlyWhere("reader", "indexed")] = 1
    """Windows that are read side by side, each by its part of the ranks: the number of hosts, so
    that not all of them fetch the same few shards. It decides the order of the samples, whatever
    the number of ranks later is."""
    shard_cache: Annotated[ShardCacheConfig | None, OnlyWhere("reader", "indexed")] = None
    """Shards of servers are fetched whole to a disk of the machine; sample by sample where None."""
    max_pixels: PositiveInt = 25_000_000
    """Larger images are refused before they are decoded."""
    bad_sample_budget: Fraction = 0.01
    """The run stops when more than this share of the samples read could not be used."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels."""
    augment: AugmentConfig = AugmentConfig()
    captions: CaptionConfig = CaptionConfig()
    noise: Annotated[NoiseConfig, OnlyWhere("reader", "indexed")] = NoiseConfig()
    select: Annotated[LocalPath | None, OnlyWhere("reader", "indexed")] = None
    """A folder of tools/reduce.py: which samples an epoch holds, and which share of the epochs
    holds each; all of them where None."""
    images: tuple[MemberName, ...] = Field(default=IMAGE_FIELDS, min_length=1)
    """Members of a sample that are its picture, the first that it has: what stands behind the first
    dot of the file's name, as `jpg` or `input.jpg`. Where none is called just so, the only member
    that ends in one of them."""

    @model_validator(mode="after")
    def _weights_of_sets_that_there_are(self) -> DataConfig:
        if self.train.endswith(".catalogue"):  # names its sets itself
            return self
        names = {split_set(part.strip())[0] for part in self.train.split("::")} - {""}
        if unknown := sorted((self.weights or {}).keys() - names):
            raise ValueError(
                f"weights names the set {unknown[0]!r}, and train has "
                f"{'the sets ' + ', '.join(sorted(names)) if names else 'no set with a name'}; "
                "write train: {name: shards}"
            )
        return self
