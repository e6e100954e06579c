"""A vision transformer on some of its patches, and what its class token attends to.

Both watch modules that are called once in a pass (the embeddings, the projections of queries and
keys), so they work on whatever transformers builds of these, checkpointed and sharded or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.folder import RAISED

_CLOSE = 1e-4
"""Largest difference of attention computed in two ways in float32."""
_CLASS_TOKENS = ("class_embedding", "cls_token", "class_token")
_WAY_OUT = "use `tokens.select: random`, which asks nobody"


def patches_per_side(backbone: Any, image_size: int) -> int:
    """Of images of so many pixels a side; ConfigError where patches can't be told apart."""
    patch = getattr(backbone.config, "patch_size", None)
    sides = set(patch) if isinstance(patch, list | tuple) else {patch}
    side = sides.pop()
    if sides or not isinstance(side, int) or not hasattr(backbone, "embeddings"):
        raise ConfigError(
            f"{type(backbone).__name__} has no patches that could be chosen from; drop the "
            "recipe's `tokens`, or use a vision transformer"
        )
    if image_size % side:
        raise ConfigError(
            f"{image_size} pixels a side are no whole number of patches of {side}; use "
            f"{max(1, image_size // side) * side}"
        )
    return image_size // side


@contextmanager
def reading_only(
    backbone: Any, kept: Int64[Tensor, "n kept"] | None, *, image_size: int
) -> Iterator[None]:
    """Within it the blocks see, of the patches of image i, those numbered `kept[i]` alone.

    Positions are added before, and states that stand before the patches (class token, registers)
    stay. What follows costs as much as so few tokens do. All patches where `kept` is None.
    """
    if kept is None:
        yield
        return
    num_patches = patches_per_side(backbone, image_size) ** 2
    chosen = partial(_kept_states, kept=kept, num_patches=num_patches)
    handle = backbone.embeddings.register_forward_hook(chosen)
    try:
        yield
    finally:
        handle.remove()


def _kept_states(
    _module: nn.Module, _inputs: Any, output: Any, *, kept: Tensor, num_patches: int
) -> Any:
    states, *others = output if isinstance(output, tuple) else (output,)
    leading = states.shape[1] - num_patches
    before = torch.arange(leading, device=kept.device).expand(len(kept), leading)
    rows = torch.cat([before, kept + leading], dim=1)
    read = states.gather(1, rows[..., None].expand(-1, -1, states.shape[2]))
    return (read, *others) if isinstance(output, tuple) else read


class ClassAttention:
    """The attention of the first state in the layers of one pass, from its queries and all keys.

    One row a layer and head: a whole map of attention exists nowhere.
    """

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads
        self.num_layers = 0
        self._queries: dict[nn.Module, Tensor] = {}
        self._sum: Tensor | None = None

    @property
    def mean(self) -> Float[Tensor, "n states"]:
        """Over layers and heads; each image's row sums to one."""
        assert self._sum is not None, "nothing has run"
        return self._sum / self.num_layers

    def see_queries(self, attention: nn.Module, queries: Float[Tensor, "n states width"]) -> None:
        self._queries[attention] = queries[:, 0]

    def see_keys(self, attention: nn.Module, keys: Float[Tensor, "n states width"]) -> None:
        row = first_row(self._queries.pop(attention), keys, num_heads=self.num_heads)
        self._sum = row if self._sum is None else self._sum + row
        self.num_layers += 1


def first_row(
    query: Float[Tensor, "n width"], keys: Float[Tensor, "n states width"], *, num_heads: int
) -> Float[Tensor, "n states"]:
    """softmax(q . k / sqrt(width of a head)) over the states, the mean over heads, in float32."""
    queries, keys = (
        x.unflatten(-1, (num_heads, -1)).to(torch.promote_types(x.dtype, torch.float32))
        for x in (query, keys)
    )
    products = torch.einsum("nhw,nshw->nhs", queries * queries.shape[-1] ** -0.5, keys)
    return products.softmax(dim=-1).mean(dim=1)


@contextmanager
def watching_class_token(backbone: Any) -> Iterator[ClassAttention]:
    """Within it, every pass of the backbone is looked at; once is what it is for."""
    seen = ClassAttention(backbone.config.num_attention_heads)
    with ExitStack() as hooks:
        for attention in attentions(backbone):
            for name, see in (("q_proj", seen.see_queries), ("k_proj", seen.see_keys)):
                module = getattr(attention, name)
                hook = partial(_of, attention, see)
                hooks.callback(module.register_forward_hook(hook).remove)
        yield seen


def _of(attention: nn.Module, see: Any, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    see(attention, output)


def attentions(backbone: nn.Module) -> list[nn.Module]:
    """Modules that project queries and keys; ConfigError where there is none."""
    found = [
        module
        for module in backbone.modules()
        if hasattr(module, "q_proj") and hasattr(module, "k_proj")
    ]
    if not found:
        raise ConfigError(
            f"how {type(backbone).__name__} attends can't be looked at, so its patches can't be "
            f"scored; {_WAY_OUT}"
        )
    return found


def resized(backbone: Any, pixels: Float[Tensor, "n 3 s s"]) -> dict[str, Any]:
    """The arguments with which a backbone reads images of another size than its own."""
    own = getattr(backbone.config, "image_size", None)
    takes = inspect.signature(backbone.forward).parameters
    if pixels.shape[-1] == own or "interpolate_pos_encoding" not in takes:
        return {}
    return {"interpolate_pos_encoding": True}


def check_chosen_patches(backbone: Any, image_size: int) -> None:
    """ConfigError where a backbone can't run on some of its patches, as those with rotary or
    relative positions can't; all patches must give what it gives without being asked."""
    pixels = _noise(backbone, image_size)
    everyone = torch.arange(patches_per_side(backbone, image_size) ** 2)[None].to(pixels.device)
    failure: BaseException | None = None
    try:
        with _quiet(backbone):
            whole = backbone(pixel_values=pixels).last_hidden_state
            with reading_only(backbone, everyone, image_size=image_size):
                same = torch.equal(whole, backbone(pixel_values=pixels).last_hidden_state)
            with reading_only(backbone, everyone[:, ::2], image_size=image_size):
                backbone(pixel_values=pixels)
    except RAISED as error:
        same, failure = False, error
    if not same:
        raise ConfigError(
            f"{type(backbone).__name__} can't read some of its patches alone; drop the recipe's "
            "`tokens`, or use a vision transformer that adds positions before its blocks"
        ) from failure


def check_class_attention(backbone: Any, image_size: int) -> None:
    """ConfigError where the rows that are seen aren't those of the model's own attention.

    There must be a class token; rotated or normalised queries would be seen before they are.
    """
    kind = type(backbone).__name__
    if not any(n.endswith(_CLASS_TOKENS) for n, _ in backbone.named_parameters()):
        raise ConfigError(
            f"{kind} has no class token whose attention could score patches; {_WAY_OUT}"
        )
    pixels = _noise(backbone, image_size)
    implementation = backbone.config._attn_implementation
    try:
        backbone.set_attn_implementation("eager")
        with _quiet(backbone), watching_class_token(backbone) as seen:
            output = backbone(
                pixel_values=pixels, output_attentions=True, **resized(backbone, pixels)
            )
        own = torch.stack([layer[:, :, 0].float() for layer in output.attentions]).mean((0, 2))
        same = own.shape == seen.mean.shape and torch.allclose(own, seen.mean, atol=_CLOSE, rtol=0)
    except RAISED as error:
        raise ConfigError(f"{kind}'s attention can't be looked at; {_WAY_OUT}") from error
    finally:
        backbone.set_attn_implementation(implementation)
    if not same:
        raise ConfigError(
            f"{kind} attends otherwise than by its projected queries and keys alone, so its "
            f"patches can't be scored; {_WAY_OUT}"
        )


def _noise(backbone: nn.Module, image_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, image_size, image_size, generator=generator)
    return pixels.to(next(backbone.parameters()))


@contextmanager
def _quiet(backbone: nn.Module) -> Iterator[None]:
    """Without gradients, and without whatever is random in training."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        backbone.train(was_training)
