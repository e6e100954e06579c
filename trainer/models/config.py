"""What models are made of: presets, towers, prototype heads and temperatures."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from trainer.config import Frozen, LocalPath, ModelPath, ModelSection, OnlyWith, PositiveInt
from trainer.models.presets import PRESETS

Preset = Literal["tiny", "small", "vit_b_32", "vit_b_16", "vit_l_14"]
Pooling = Literal["auto", "eos", "last", "mean", "cls"]


class LoraConfig(Frozen):
    """Low-rank additions to the linear layers of a loaded model, which itself stays frozen."""

    rank: PositiveInt = 8
    """Columns of each low-rank factor."""
    alpha: PositiveInt = 16
    """The addition is multiplied by alpha / rank."""
    layers: tuple[str, ...] | None = None
    """Last parts of the names of the layers, such as q_proj; all linear ones where None."""


class StoredConfig(Frozen):
    """Features that an encoder has computed once, and the small network that learns on them."""

    folders: tuple[LocalPath, ...] = Field(min_length=1)
    """Stores of `tools/embed.py` or `tools/tune.py`, of one encoder: they hold the training samples
    and those of the evaluations. Vector 0 of a sample is that of the whole image, further ones are
    of random views."""
    dim: PositiveInt
    """Numbers of a stored vector."""
    layers: int = Field(default=1, ge=0)
    """Linear layers, each with GELU behind it, before the projection; 0: the projection alone."""
    width: Annotated[PositiveInt, OnlyWith("layers")] = 512
    """What each of them puts out."""

    @property
    def output_dim(self) -> int:
        """What the projection reads."""
        return self.width if self.layers else self.dim


class TowerConfig(Frozen):
    """One tower: a CLIP transformer of the given size, or any transformers model at `path`."""

    path: ModelPath | None = None
    """A folder that transformers can load, or a hub id. The sizes below are then the model's."""
    stored: StoredConfig | None = None
    """Read stored features instead of pixels: no encoder runs in training (`palm`, `supcon`)."""
    width: PositiveInt | None = None
    """Numbers per token between blocks."""
    layers: PositiveInt | None = None
    """Transformer blocks."""
    heads: PositiveInt | None = None
    """Attention heads per block; a divisor of the width."""
    mlp_width: PositiveInt | None = None
    """Hidden width of a block's MLP; four times `width` where None."""
    activation: Literal["gelu", "quick_gelu"] | None = None
    """Between the two linear layers of a block; `quick_gelu` is x sigmoid(1.702 x), as OpenAI's."""
    trained: bool = True
    """A tower that is not trained keeps its weights and stays in evaluation mode."""
    lora: LoraConfig | None = None
    """Train low-rank additions instead of the weights of the model at `path`."""
    pooling: Pooling = "auto"
    """Which states become the embedding. `auto`: what the model was made for."""
    projection: Literal["auto", "new", "none"] = "auto"
    """Into the shared space. `auto`: the one at `path`, which must fit embed_dim, or a new one
    where it has none; `new` drops what is there; `none` takes the pooled state as it is."""

    def _nothing_of_an_encoder(self, given: list[str]) -> None:
        given = [*given, *(name for name in ("path", "lora") if getattr(self, name) is not None)]
        given += [] if self.trained else ["trained"]
        given += [] if self.pooling == "auto" else ["pooling"]
        if given:
            raise ValueError(f"stored features have no encoder; drop {', '.join(given)} or stored")

    @model_validator(mode="after")
    def _path_or_sizes(self) -> TowerConfig:
        sizes = {
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "mlp_width": self.mlp_width,
            "activation": self.activation,
        }
        given = [name for name, value in sizes.items() if value is not None]
        if self.stored is not None:
            self._nothing_of_an_encoder(given)
        if self.path is not None and given:
            raise ValueError(f"path fixes the sizes; drop {', '.join(given)} or path")
        if self.path is None and self.stored is None and self.projection != "auto":
            raise ValueError(f"projection {self.projection} is for a loaded model; drop it")
        if self.lora and (self.path is None or not self.trained):
            raise ValueError(
                "lora adds to a model that is loaded and trained; set path and trained"
            )
        if self.width and self.heads and self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        return self


class HeadConfig(Frozen):
    """ProtoCLIP's projection head: `layers` x (Linear, norm, ReLU), then Linear."""

    layers: int = Field(default=1, ge=0)
    """Zero: a single Linear."""
    hidden: Annotated[PositiveInt, OnlyWith("layers")] = 2048
    """Width between its layers."""
    dim: PositiveInt = 128
    """Numbers that it puts out, which are compared with prototypes."""
    norm: Annotated[Literal["batch", "layer", "none"], OnlyWith("layers")] = "batch"
    """`batch` takes its statistics over the micro-batches of all ranks."""


class TwoTowerConfig(ModelSection):
    """An image and a text encoder into one space. What isn't given comes from `preset`."""

    preset: Preset = "tiny"
    """Sizes to begin with; each key that is given replaces one."""
    image: TowerConfig
    text: TowerConfig
    patch_size: PositiveInt | None = None
    """Pixels per side of a patch. Where there is a model at `image.path` it is that one's: leave it
    out, or say the same."""
    text_length: PositiveInt
    """Tokens per caption, begin and end included."""
    vocabulary: PositiveInt | None = None
    """Size of the tokenizer that is trained on the corpus; null where one is given."""
    tokenizer: ModelPath | None = None
    """A folder with a tokenizer; `text.path` where that is given and this is not."""
    head: HeadConfig | None = None
    """Projection heads for prototypes; none where None."""
    bias: bool = False
    """A learned bias of the logits (SigLIP)."""
    logit_scale_init: float | None = Field(default=None, gt=0)
    """Where None, that of the pair if both towers are loaded from one, else 1 / 0.07, or 10 with
    a bias."""
    logit_bias_init: Annotated[float | None, OnlyWith("bias")] = None
    """Where None, that of the pair if both towers are loaded from one, else -10."""
    prototype_scale_init: Annotated[float, OnlyWith("head"), Field(gt=0)] = 1 / 0.07
    """What cosines with prototypes are multiplied by at the start; learnt."""
    scale_max: float = Field(default=100.0, gt=1)
    """Scales are kept within [1, scale_max]."""

    def __init__(self, **values: Any) -> None:  # the validator below fills the fields in
        super().__init__(**values)

    @property
    def initial_logit_scale(self) -> float:
        """Without a word of a loaded pair."""
        return self.logit_scale_init or (10.0 if self.bias else 1 / 0.07)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled = _filled(values, towers=("image", "text"))
        text = filled["text"]
        if values.get("tokenizer") or (isinstance(text, dict) and text.get("path")):
            filled["vocabulary"] = values.get("vocabulary")
        return filled

    @model_validator(mode="after")
    def _one_source_of_words(self) -> TwoTowerConfig:
        if self.text.stored is not None:
            raise ValueError("text.stored: stored features stand in the place of images; drop it")
        given = self.tokenizer or self.text.path
        if given and self.vocabulary is not None:
            raise ValueError(f"vocabulary is that of the tokenizer in {given}; drop it")
        if not given and self.vocabulary is None:
            raise ValueError("vocabulary is null, and no tokenizer is given that has one")
        return self

    @model_validator(mode="after")
    def _whole_patches(self) -> TwoTowerConfig:
        _check_patches(self)
        return self


class ImageTowerConfig(ModelSection):
    """An image encoder alone. What isn't given comes from `preset`."""

    preset: Preset = "tiny"
    """Sizes to begin with; each key that is given replaces one."""
    image: TowerConfig
    patch_size: PositiveInt | None = None
    """Pixels per side of a patch. Where there is a model at `image.path` it is that one's: leave it
    out, or say the same."""
    head: HeadConfig | None = None
    """A projection head whose output stands beside the embedding; none where None."""

    @property
    def compared_dim(self) -> int:
        """Width of what is compared with prototypes: the head's, where there is one."""
        return self.head.dim if self.head else self.embed_dim

    def __init__(self, **values: Any) -> None:  # the validator below fills the fields in
        super().__init__(**values)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        return _filled(values, towers=("image",)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _whole_patches(self) -> ImageTowerConfig:
        _check_patches(self)
        return self


ModelConfig = TwoTowerConfig | ImageTowerConfig


def _filled(values: dict[str, Any], *, towers: tuple[str, ...]) -> dict[str, Any]:
    """A model's section with the preset's values where it says nothing; heads only if asked for."""
    name = values.get("preset", "tiny")
    if not isinstance(name, str) or name not in PRESETS:
        raise _unknown_preset(name)
    preset = PRESETS[name]
    keys = preset.keys() - {"image", "text", "head"}
    if "text" not in towers:
        keys -= {"text_length", "vocabulary"}
    filled = {**{key: preset[key] for key in keys}, **values}
    for name in (*towers, "head"):
        section = _given(values.get(name, {} if name != "head" else None))
        if isinstance(section, dict):
            section = section if _has_its_sizes(section) else {**preset[name], **section}
            if name == "head" and section.get("layers") == 0 and "hidden" not in values[name]:
                section.pop("hidden", None)
        filled[name] = section
    if isinstance(filled["image"], dict) and _has_its_sizes(filled["image"]):
        filled["patch_size"] = values.get("patch_size")
    return filled


def _has_its_sizes(section: dict[str, Any]) -> bool:
    return bool(section.get("path") or section.get("stored"))


def _settled(value: Any, info: Any, *, key: str, on: Any) -> Any:
    values = _given(value)
    if not isinstance(values, dict):
        return value
    if key in values and values[key] is False:
        recipe = info.data.get("name", "this recipe")
        raise ValueError(f"{recipe} trains with a {key}; drop `{key}: false`")
    return {**values, key: values.get(key) or on}


def _with_head(value: Any, info: Any) -> Any:
    return _settled(value, info, key="head", on={})


def _with_bias(value: Any, info: Any) -> Any:
    return _settled(value, info, key="bias", on=True)


def lexical_sections(value: Any) -> Any:
    """A two-tower section whose texts end at the language model's last state, and whose images
    are no single vector: neither has a projection to choose."""
    values = _given(value)
    if not isinstance(values, dict):
        return value
    text, image = (_given(values.get(name, {})) for name in ("text", "image"))
    if not (isinstance(text, dict) and isinstance(image, dict)):
        return value
    for name, section in (("text", text), ("image", image)):
        for key, allowed in _LEXICAL[name].items():
            if (said := section.get(key, "auto")) not in allowed:
                raise ValueError(
                    f"{name}.{key} is {said}, and lexical vectors have none to choose; drop it"
                )
    text = {**text, "pooling": "last"}
    text |= {"projection": "none"} if text.get("path") else {}
    image = {**image, "projection": "new"} if image.get("path") else image
    return {**values, "text": text, "image": image}


_LEXICAL: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {"pooling": ("auto", "last"), "projection": ("auto", "none")},
    "image": {"pooling": ("auto",), "projection": ("auto", "new")},
}

HeadedTwoTower = Annotated[TwoTowerConfig, BeforeValidator(_with_head)]
"""Of a recipe that needs prototype heads: the given ones, else the preset's."""
SigmoidTwoTower = Annotated[TwoTowerConfig, BeforeValidator(_with_bias)]
"""Of a recipe that needs the logits' bias."""


def _unknown_preset(name: Any) -> ValidationError:
    """The one error of a section whose preset is not known: nothing else in it can be judged."""
    known = ", ".join(f"'{known}'" for known in PRESETS)
    problem: InitErrorDetails = {
        "type": PydanticCustomError("literal_error", "not known", {"expected": known}),
        "loc": ("preset",),
        "input": name,
    }
    return ValidationError.from_exception_data("model", [problem])


def _check_patches(config: ModelConfig) -> None:
    if config.image.stored is not None:
        _refuse_pixels(config)
        return
    if config.image.path is not None:
        return
    if config.patch_size is None:
        raise ValueError("patch_size is null, and there is no model at image.path to have one")
    if config.image_size % config.patch_size:
        lower = config.image_size // config.patch_size * config.patch_size
        raise ValueError(
            f"image_size {config.image_size} is not divisible by patch_size {config.patch_size}; "
            f"use {lower or config.patch_size} or {lower + config.patch_size}"
        )


def _refuse_pixels(config: ModelConfig) -> None:
    """Stored features have none, so the preset's size is the only one that says nothing."""
    if config.patch_size is not None or config.image_size != PRESETS[config.preset]["image_size"]:
        raise ValueError(
            "stored features have no pixels; drop image_size and patch_size, or image.stored"
        )


def _given(section: Any) -> Any:
    """A section as the mapping of the keys that were set; other values as they are."""
    return section.model_dump(exclude_unset=True) if isinstance(section, Frozen) else section
