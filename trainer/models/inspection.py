"""What a loaded encoder really does, found by running it once: for towers and teachers alike.

A probe goes through it twice, as in training. Answers must repeat, and an answer to a text must
depend on that text alone. Which states there are, whether the model pools by itself, and how long
a row may be are looked at, not looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.folder import RAISED, Part, first_line
from trainer.models.stored import running_as_stored

_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")
_PROBE_TOKENS = 6
_CLOSE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Relative distance of two outputs that should be equal up to rounding."""


class Sight(NamedTuple):
    """What was found about an image encoder."""

    width: int
    """Numbers of a state."""
    has_class_token: bool
    """The first state stands for the whole image."""
    pools: bool
    """The model makes one vector of its states by itself, other than the first state."""


class Reach(NamedTuple):
    """What was found about a text encoder."""

    width: int
    longest: int | None
    """Tokens of a row at most; None where no limit was met."""
    pools: bool
    """The model makes one vector of its states by itself."""
    fills: bool
    """It pools at the end of the row, whatever the mask says: rows are of one length."""
    row: int | None
    """That length."""


def inspect_images(
    model: Any, path: Path | str, *, size: int, trained: bool = False, of_pair: bool = False
) -> Sight:
    """Run an image encoder on noise of `size` pixels; ConfigError where it can't be used so.

    What a pair has learned to compare may be what its towers' poolers say, so these stay.
    """
    if not of_pair:
        leave_out_pooler(model)
    if trained:
        _refuse_batch_norm(model, path)
    pixels = _noise(size, model)
    output = _twice(model, path, "image", pixel_values=pixels)
    states = output.last_hidden_state
    if not isinstance(states, Tensor) or states.dim() not in (3, 4):
        raise ConfigError(f"{path}: {_kind(model)} gives no states of an image, so it is no tower")
    has_class = states.dim() == 3 and any(
        name.endswith(_CLASS_TOKENS) for name, _ in model.named_parameters()
    )
    pooled = getattr(output, "pooler_output", None)
    own = pooled is not None and not (has_class and _near(pooled, states[:, 0]))
    width = states.shape[-1] if states.dim() == 3 else states.shape[1]
    return Sight(int(width), has_class, own)


def inspect_text(
    model: Any,
    tokenizer: Any,
    path: Path | str,
    *,
    length: int | None = None,
    of_pair: bool = False,
) -> Reach:
    """Run a text encoder on a few tokens, and on a row of `length`, for as long as it can read.

    The tokenizer must fit the model; `of_pair` as above. ConfigError where one of them can't be
    used.
    """
    if not of_pair:
        leave_out_pooler(model)
    _check_vocabulary(model, tokenizer, path)
    rows = _tokens(tokenizer, model)
    mask = torch.ones_like(rows)
    output = _twice(model, path, "text", input_ids=rows, attention_mask=mask)
    states = getattr(output, "last_hidden_state", None)
    if not isinstance(states, Tensor) or states.dim() != 3:
        raise ConfigError(f"{path}: {_kind(model)} gives no states of tokens, so it reads no text")
    pooled = getattr(output, "pooler_output", None)
    fills = _sees_padding(model, rows, output, tokenizer, path)
    return Reach(
        width=int(states.shape[-1]),
        longest=None if length is None else _longest(model, rows, length),
        pools=pooled is not None,
        fills=fills,
        row=getattr(model.config, "max_position_embeddings", None) if fills else None,
    )


def leave_out_pooler(model: Any) -> None:
    """Drop a pooler of a linear map and tanh: it was made for another task, or never trained."""
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module) and isinstance(getattr(pooler, "dense", None), nn.Linear):
        model.pooler = None


def leave_out_head(model: Any) -> None:
    """Drop what would pool, where something else is read: its weights would see no gradient."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None
    if getattr(model, "use_head", False):
        # The configuration goes along, or a saved copy would lack what it says it has.
        model.use_head = model.config.vision_use_head = False
        del model.head


def hold_unread(model: nn.Module, output: Callable[[], Tensor]) -> None:
    """Parameters that no output depends on, such as a mask token, stay as they are."""
    trained = [value for value in model.parameters() if value.requires_grad]
    if not trained:
        return
    read: set[nn.Parameter] = set()

    def note(value: nn.Parameter) -> None:
        read.add(value)
        value.grad = None  # or all gradients would be held at once

    hooks = [value.register_post_accumulate_grad_hook(note) for value in trained]
    try:
        with torch.enable_grad(), running_as_stored(model):
            output().float().sum().backward(inputs=trained)
    finally:
        for hook in hooks:
            hook.remove()
    for value in trained:
        if value not in read:
            value.requires_grad_(False)


def _twice(model: Any, path: Path | str, part: Part, **inputs: Tensor) -> Any:
    """The output of a pass in training mode, which a second one must repeat."""
    before = {name: value.clone() for name, value in model.named_buffers()}
    was_training = model.training
    model.train()
    try:
        with torch.no_grad():
            first, second = model(**inputs), model(**inputs)
    except RAISED as error:
        raise ConfigError(_not_run(model, path, part, error, inputs)) from error
    finally:
        model.train(was_training)
        for name, value in model.named_buffers():
            if name in before and value.shape == before[name].shape:
                value.copy_(before[name])
    for one, two in zip(_tensors(first), _tensors(second), strict=True):
        if one.shape != two.shape or not _near(one, two):
            raise ConfigError(
                f"{path}: {_kind(model)} answers the same {part} differently each time, so "
                "something random is left on in it that has no known switch; use another model"
            )
    return first


def _not_run(
    model: Any, path: Path | str, part: Part, error: BaseException, inputs: dict[str, Tensor]
) -> str:
    kind, size = _kind(model), getattr(model.config, "image_size", None)
    if part == "image" and isinstance(size, int) and size != inputs["pixel_values"].shape[-1]:
        asked = inputs["pixel_values"].shape[-1]
        return (
            f"image_size is {asked}, but {path} was made for {size}; set model.image_size={size} "
            f"(for a teacher image_size={size})"
        )
    if "spatial_shapes" in str(error):
        return (
            f"{path}: {kind} reads lists of patches of images in their own shape (NaFlex); use "
            "a checkpoint of one fixed resolution"
        )
    what = "images" if part == "image" else "texts"
    return f"{path}: {kind} can't read {what} as a tower or teacher does: {first_line(error)}"


def _refuse_batch_norm(model: nn.Module, path: Path | str) -> None:
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ConfigError(
            f"{path}: {_kind(model)} has batch norms, so what it says of an image depends on the "
            "micro-batch; train another model, or keep it frozen: trained=false"
        )


def _check_vocabulary(model: Any, tokenizer: Any, path: Path | str) -> None:
    try:
        rows = model.get_input_embeddings().num_embeddings
    except RAISED:
        raise ConfigError(
            f"{path}: {_kind(model)} has no embeddings of tokens, so it reads no texts"
        ) from None
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but {path} has embeddings "
            f"for {rows}; use the tokenizer of that model"
        )


def _longest(model: Any, rows: Tensor, length: int) -> int | None:
    """The most tokens, up to `length`, that a row may have; None where `length` may be passed."""
    said = getattr(model.config, "max_position_embeddings", None)
    high = length if not isinstance(said, int) or said <= 0 else min(length, said)
    if not _has_tables(model) or _reads(model, rows, high):
        return None if high == length else high
    low = 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _reads(model, rows, middle) else (low, middle)
    return low


def _has_tables(model: Any) -> bool:
    """Whether there is a table besides the tokens', which may be too short for a long row."""
    tokens = model.get_input_embeddings()
    return any(isinstance(m, nn.Embedding) and m is not tokens for m in model.modules())


def _reads(model: Any, rows: Tensor, length: int) -> bool:
    """Whether a row of so many tokens goes through, none of them padding."""
    inner = rows[:, rows.shape[1] // 2].view(1, 1).expand(1, length)
    try:
        with torch.no_grad():
            model(input_ids=inner, attention_mask=torch.ones_like(inner))
    except RAISED:
        return False
    return True


def _sees_padding(model: Any, rows: Tensor, output: Any, tokenizer: Any, path: Path | str) -> bool:
    """Whether padding behind a text changes what the model pools by itself.

    ConfigError where it changes the states of the text, too, although a mask hides it.
    """
    spare = torch.full_like(rows[:, :2], tokenizer.pad_token_id)
    mask = torch.cat([torch.ones_like(rows), torch.zeros_like(spare)], dim=1)
    try:
        with torch.no_grad():
            padded = model(input_ids=torch.cat([rows, spare], dim=1), attention_mask=mask)
    except RAISED as error:
        raise ConfigError(
            f"{path}: {_kind(model)} reads no row of {mask.shape[1]} tokens, which is too few for "
            f"texts: {first_line(error)}"
        ) from error
    if not _near(padded.last_hidden_state[:, : rows.shape[1]], output.last_hidden_state):
        raise ConfigError(
            f"{path}: {_kind(model)} says other things of a text when padding stands behind it, "
            "mask or not, so its vectors would depend on what they are computed with"
        )
    pooled = getattr(output, "pooler_output", None)
    return pooled is not None and not _near(padded.pooler_output, pooled)


def _noise(size: int, model: nn.Module) -> Float[Tensor, "2 3 size size"]:
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, size, size, generator=generator).to(weight.device, weight.dtype)


def _tokens(tokenizer: Any, model: Any) -> Int64[Tensor, "1 length"]:
    """A few tokens of the vocabulary between those that the tokenizer puts around a text."""
    plain = [n for n in range(len(tokenizer)) if n not in set(tokenizer.all_special_ids)]
    middle = (plain[: _PROBE_TOKENS // 2] or [0]) * 2
    ids = tokenizer("a", truncation=False)["input_ids"]
    rows = torch.tensor([[*ids[:1], *middle[: _PROBE_TOKENS - 2], *ids[-1:]]])
    return rows.to(model.get_input_embeddings().weight.device)


def _tensors(output: Any) -> list[Tensor]:
    found = (getattr(output, name, None) for name in ("last_hidden_state", "pooler_output"))
    return [value for value in found if isinstance(value, Tensor)]


def _near(one: Tensor, two: Tensor) -> bool:
    gap = (one.float() - two.float()).norm()
    return bool(gap <= _CLOSE.get(two.dtype, 1e-3) * two.float().norm().clamp(min=1e-6))


def _kind(model: Any) -> str:
    return type(model).__name__
