"""A smaller tower out of a larger one: which layers, channels, heads and neurons it takes over.

The same lists cut weights before a run begins, and weights and moments in the middle of one
(`Engine.rebuild`). For towers of CLIP's layers, whose parameters have the names that transformers
gives them. TinyCLIP, arXiv 2309.12314, section 3.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPVisionModel, PreTrainedTokenizerFast

from trainer.config import Frozen, LocalPath
from trainer.data.tokenize import load_tokenizer, tokenizer_digest
from trainer.engine.kept import Kept
from trainer.errors import ConfigError
from trainer.models.folder import Part, folder_settings, load_folder
from trainer.models.tower import Tower

Unit = Literal["hidden", "heads", "neurons"]
WidthRule = Literal["leading", "magnitude"]

_ROLES: tuple[tuple[str, tuple[Unit | None, ...]], ...] = (
    (r"self_attn\.[qkv]_proj\.weight", ("heads", "hidden")),
    (r"self_attn\.[qkv]_proj\.bias", ("heads",)),
    (r"self_attn\.out_proj\.weight", ("hidden", "heads")),
    (r"mlp\.fc1\.weight", ("neurons", "hidden")),
    (r"mlp\.fc1\.bias", ("neurons",)),
    (r"mlp\.fc2\.weight", ("hidden", "neurons")),
    (r"embeddings\.patch_embedding\.weight", ("hidden",)),
    (r"embeddings\.(token|position)_embedding\.weight", (None, "hidden")),
    (r"projection\.weight", (None, "hidden")),
    # Class embedding, norms, and the biases of projections back into the stream.
    (r"(class_embedding|(pre_layrnorm|\w*layer_?norm\d?)\.\w+|(out_proj|fc2)\.bias)", ("hidden",)),
)
"""What each dimension of a parameter counts, by the end of its name."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_LAYER = re.compile(r"(.*encoder\.layers\.)(\d+)(\..*)")


class InheritConfig(Frozen):
    """Beginning with a part of a larger pair's weights."""

    path: LocalPath
    """A folder with a CLIP pair that transformers saved."""
    width: WidthRule = "leading"
    """Which channels, heads and neurons: the first ones, or those of the greatest weights. Layers
    are taken at even distances."""


class Units(NamedTuple):
    """What a smaller tower keeps, in its own order; heads and neurons for each of its layers."""

    layers: Sequence[int]
    """The larger tower's layer that each layer comes from."""
    hidden: Int64[Tensor, " width"]
    heads: Sequence[Int64[Tensor, " heads"]]
    neurons: Sequence[Int64[Tensor, " neurons"]]


class Sizes(NamedTuple):
    """Of one tower; heads and neurons are those of every layer."""

    layers: int
    width: int
    heads: int
    neurons: int


def layer_map(teacher: int, student: int) -> list[int]:
    """The layer of `teacher` that each of `student` layers starts from: every n-th one.

    n is the floor of their ratio, as published, so 12 to 9 takes the first nine.
    """
    if not 1 <= student <= teacher:
        raise ConfigError(f"a tower of {student} layers can't inherit from one of {teacher}")
    step = teacher // student
    return [layer * step for layer in range(student)]


def inherited_units(
    teacher: Sizes,
    student: Sizes,
    *,
    weights: Mapping[str, Tensor] | None = None,
    head_dim: int,
) -> Units:
    """The units that a student of these sizes takes: the first ones, or, given the teacher's
    `weights` by name, those of the greatest magnitude, in their old order.

    Magnitude is the L1 norm of all weights that a unit has part in; the hidden channels are shared
    by all layers, so theirs is over the whole tower.
    """
    for name, old, new in zip(Sizes._fields, teacher, student, strict=True):
        if new > old:
            raise ConfigError(f"a tower with {name}={new} can't inherit from one with {old}")
    layers = layer_map(teacher.layers, student.layers)
    if weights is None:
        first = [torch.arange(count) for count in student]
        return Units(layers, first[1], [first[2]] * len(layers), [first[3]] * len(layers))
    hidden = _largest(_norms(weights, "hidden", teacher, head_dim), student.width)
    of_layers = [_of_layer(weights, layer) for layer in layers]
    heads = [_largest(_norms(w, "heads", teacher, head_dim), student.heads) for w in of_layers]
    neurons = [
        _largest(_norms(w, "neurons", teacher, head_dim), student.neurons) for w in of_layers
    ]
    return Units(layers, hidden, heads, neurons)


def kept_places(name: str, units: Units, *, head_dim: int) -> Kept:
    """Which old parameter, and which of its rows and columns, a parameter of the smaller tower is.

    ConfigError for a name that no CLIP tower has.
    """
    roles = _roles(name)
    layer, old = None, name
    if match := _LAYER.fullmatch(name):
        layer = int(match[2])
        old = f"{match[1]}{units.layers[layer]}{match[3]}"
    places = {
        dim: _ids(role, units, layer, head_dim)
        for dim, role in enumerate(roles)
        if role is not None
    }
    return Kept(old, places)


def inherit(
    teacher: Mapping[str, Tensor], names: Sequence[str], units: Units, *, head_dim: int
) -> dict[str, Tensor]:
    """The weights of a smaller tower's parameters `names`; exact copies of the teacher's.

    ConfigError where the teacher lacks one.
    """
    kept = {name: kept_places(name, units, head_dim=head_dim) for name in names}
    if lacking := sorted(k.name for k in kept.values() if k.name not in teacher):
        raise ConfigError(f"the tower to inherit from has no {lacking[0]}; both must be CLIP's")
    return {name: one.of(teacher[one.name]).clone() for name, one in kept.items()}


def with_activations(values: Any) -> Any:
    """A recipe's section in which towers that say no activation have that of the pair at
    `inherit.path`, where that can be read."""
    inherit = values.get("inherit") if isinstance(values, dict) else None
    path = inherit.get("path") if isinstance(inherit, dict) else None
    model = values.get("model", {}) if path else None
    if not isinstance(model, dict):
        return values
    try:
        settings = folder_settings(str(path), local_files_only=True)
    except ConfigError:
        return values  # said where it is read
    for name, key in (("image", "vision_config"), ("text", "text_config")):
        tower = model.get(name, {})
        activation = getattr(getattr(settings, key, None), "hidden_act", None)
        if isinstance(tower, dict) and not tower.get("path") and activation:
            model = {**model, name: {"activation": activation, **tower}}
    return {**values, "model": model}


def refuse_other_ids(config: InheritConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """ConfigError where rows of the larger pair's token embedding stand for other tokens than the
    smaller one's; a folder without a tokenizer is taken at its word."""
    if not any((config.path / name).exists() for name in TOKENIZER_FILES):
        return
    if tokenizer_digest(load_tokenizer(str(config.path))) != tokenizer_digest(tokenizer):
        raise ConfigError(
            f"{config.path} reads texts with another tokenizer, so its token embeddings would be "
            f"inherited by other tokens; set recipe.model.tokenizer={config.path}"
        )


def inherit_from(config: InheritConfig, part: Part, tower: Tower) -> None:
    """Fill a tower with a part of the weights at `config.path`, in place.

    ConfigError where that is no CLIP pair, or differs in more than width and depth.
    """
    loaded = load_folder(config.path, part=part)
    sizes, own = _sizes(loaded.backbone, config.path), _sizes(tower.backbone, config.path)
    head_dim, wanted = sizes.width // sizes.heads, own.width // own.heads
    if head_dim != wanted:
        raise ConfigError(
            f"heads of the {part} tower have {wanted} numbers and those at {config.path} "
            f"{head_dim}; whole heads are inherited, so set model.{part}.heads to "
            f"{own.width // head_dim}"
        )
    _refuse_other_function(config, part, loaded.backbone.config, tower.backbone.config)
    weights = {f"backbone.{name}": value for name, value in loaded.backbone.named_parameters()}
    if isinstance(loaded.projection, nn.Linear):
        weights["projection.weight"] = loaded.projection.weight
    chosen = weights if config.width == "magnitude" else None
    units = inherited_units(sizes, own, weights=chosen, head_dim=head_dim)
    parameters = dict(tower.named_parameters())
    found = inherit(weights, list(parameters), units, head_dim=head_dim)
    for name, value in found.items():
        if value.shape != parameters[name].shape:
            raise ConfigError(
                f"{part} {name} is {list(parameters[name].shape)} and would inherit "
                f"{list(value.shape)} from {config.path}; patch_size, image_size, text_length, "
                "tokenizer and embed_dim must be those of the larger pair"
            )
        parameters[name].data.copy_(value)


def _sizes(backbone: Any, path: Path) -> Sizes:
    if not isinstance(backbone, CLIPTextModel | CLIPVisionModel):
        raise ConfigError(f"{path} has a {type(backbone).__name__}; only CLIP's towers are cut")
    said = backbone.config
    return Sizes(
        said.num_hidden_layers, said.hidden_size, said.num_attention_heads, said.intermediate_size
    )


def _refuse_other_function(config: InheritConfig, part: Part, large: Any, small: Any) -> None:
    """The same weights between other activations are another function."""
    if large.hidden_act != small.hidden_act:
        raise ConfigError(
            f"the {part} tower at {config.path} has {large.hidden_act} between its weights and "
            f"this one {small.hidden_act}; set model.{part}.activation={large.hidden_act}"
        )


def _roles(name: str) -> tuple[Unit | None, ...]:
    for pattern, roles in _ROLES:
        if re.search(rf"(^|\.){pattern}$", name):
            return roles
    raise ConfigError(f"what the dimensions of {name} count isn't known; only CLIP's towers shrink")


def _ids(role: Unit, units: Units, layer: int | None, head_dim: int) -> Tensor:
    if role == "hidden":
        return units.hidden
    assert layer is not None
    if role == "neurons":
        return units.neurons[layer]
    return (units.heads[layer][:, None] * head_dim + torch.arange(head_dim)).flatten()


def _of_layer(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {n: w for n, w in weights.items() if (m := _LAYER.fullmatch(n)) and int(m[2]) == layer}


def _norms(weights: Mapping[str, Tensor], unit: Unit, sizes: Sizes, head_dim: int) -> Tensor:
    """The L1 norm of everything that belongs to each unit."""
    count = {"hidden": sizes.width, "heads": sizes.heads * head_dim, "neurons": sizes.neurons}[unit]
    total = torch.zeros(count, dtype=torch.float64)
    for name, weight in weights.items():
        for dim, role in enumerate(_roles(name)):
            if role == unit:
                rows = weight.detach().to("cpu", torch.float64).movedim(dim, 0)
                total += rows.abs().flatten(1).sum(dim=1) if rows.dim() > 1 else rows.abs()
    return total.view(-1, head_dim).sum(dim=1) if unit == "heads" else total


def _largest(norms: Tensor, count: int) -> Tensor:
    """The places of the `count` largest, in their order; of equal ones the first."""
    return norms.argsort(descending=True, stable=True)[:count].sort().values
