"""Some of the patches: the whole model's numbers, on as many tokens as were asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.models.small import small_batch, small_config, word_tokenizer
from trainer.errors import ConfigError
from trainer.models.patches import (
    check_chosen_patches,
    check_class_attention,
    patches_per_side,
    reading_only,
)
from trainer.models.tower import Tower
from trainer.models.two_tower import build_two_tower

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
WITH_CLASS_TOKEN = ("CLIPVision", "ViT", "Dinov2", "Dinov2WithRegisters", "DeiT")
LEADING = {"Dinov2WithRegisters": 5, "DeiT": 2, "SiglipVision": 0}
PATCHES = 16


def backbone(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    model = getattr(transformers, f"{kind}Model")(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # attention that is not flat
    return model.eval()


def pixels(count: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def drawn_patches(count: int, kept: int) -> Tensor:
    order = torch.rand(count, PATCHES, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return order[:, :kept].sort(dim=1).values


@pytest.mark.parametrize("kind", [*WITH_CLASS_TOKEN, "SiglipVision"])
def test_all_patches_in_order_are_the_dense_pass_to_the_bit(kind: str) -> None:
    model, images = backbone(kind), pixels()
    check_chosen_patches(model, 32)
    everyone = torch.arange(PATCHES).expand(3, PATCHES)
    dense = model(pixel_values=images).last_hidden_state
    with reading_only(model, everyone, image_size=32):
        assert torch.equal(model(pixel_values=images).last_hidden_state, dense)
    shuffled = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(3))
    with reading_only(model, everyone[:, shuffled], image_size=32):
        other = model(pixel_values=images).last_hidden_state
    leading = LEADING.get(kind, 1)
    order = torch.cat([torch.arange(leading), shuffled + leading])
    torch.testing.assert_close(other, dense[:, order], rtol=0, atol=3e-5)
    assert torch.equal(model(pixel_values=images).last_hidden_state, dense), "the hook is gone"


@pytest.mark.parametrize("kind", [*WITH_CLASS_TOKEN, "SiglipVision"])
def test_what_is_left_out_is_not_seen_and_what_is_kept_is_at_its_place(kind: str) -> None:
    """Pixels of patches that are left out may be anything; those of kept ones matter."""
    model, images, kept = backbone(kind), pixels(), drawn_patches(3, 5)
    noise = pixels(3).flip(0) * 9
    is_kept = torch.zeros(3, PATCHES, dtype=torch.bool).scatter(1, kept, True)
    shown = is_kept.view(3, 1, 4, 1, 4, 1).expand(3, 3, 4, 8, 4, 8).reshape(3, 3, 32, 32)
    with reading_only(model, kept, image_size=32):
        states = model(pixel_values=images).last_hidden_state
        disturbed = model(pixel_values=torch.where(shown, images, noise)).last_hidden_state
        moved = model(pixel_values=torch.where(shown, noise, images)).last_hidden_state
    assert states.shape[1] == 5 + LEADING.get(kind, 1)
    torch.testing.assert_close(disturbed, states, rtol=0, atol=1e-6)
    assert not torch.allclose(moved, states, atol=1e-2)


@pytest.mark.parametrize("size", [32, 16])
@pytest.mark.parametrize("kind", WITH_CLASS_TOKEN)
def test_scores_are_the_models_own_attention_rows_at_full_and_half_size(
    kind: str, size: int
) -> None:
    """Against the maps of the model's plain attention, taken whole; rows are no more than one."""
    model, images = backbone(kind), pixels(size=size)
    check_class_attention(model, size)
    model.set_attn_implementation("sdpa")
    tower = Tower(model, torch.nn.Identity(), pool="cls", trained=True)
    pooled, scores = tower(images, wanted="attended")
    resize = {} if size == 32 or kind.startswith("Dinov2") else {"interpolate_pos_encoding": True}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(pixel_values=images, output_attentions=True, **resize)
    rows = torch.stack([layer.double()[:, :, 0] for layer in output.attentions])
    num_patches = (size // 8) ** 2
    wanted = rows.mean((0, 2))[:, -num_patches:]
    assert scores.shape == (3, num_patches)
    torch.testing.assert_close(scores.double(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(pooled, output.last_hidden_state[:, 0], rtol=0, atol=1e-5)
    assert scores.min() >= 0
    leading = rows[..., : rows.shape[-1] - num_patches].sum(-1).mean((0, 2))
    torch.testing.assert_close(scores.double().sum(1), 1 - leading, rtol=0, atol=1e-6)
    assert scores.std() > 1e-3, "flat attention would prove nothing"


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that a kernel gives."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        found = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.size = max([self.size, *found])
        return result


def test_scoring_holds_no_map_of_attention() -> None:
    """577 tokens, 8 heads: a layer's map would have 2.7 million numbers an image."""
    model = backbone("CLIPVision", image_size=96, patch_size=4, num_attention_heads=8)
    model.set_attn_implementation("sdpa")
    tower = Tower(model, torch.nn.Identity(), pool="clip", trained=True)
    with LargestTensor() as largest:
        tower(pixels(1, 96), wanted="attended")
    tokens = 577
    assert largest.size <= tokens * 64 < tokens**2 < 8 * tokens**2


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("SiglipVision", "no class token"),
        ("DINOv3ViT", "attends otherwise"),
        ("Pixtral" + "Vision", "no class token"),
    ],
)
def test_a_model_that_cannot_be_scored_is_refused(kind: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said}.*select: random"):
        check_class_attention(backbone(kind), 32)


def test_models_whose_patches_cannot_be_chosen_are_refused() -> None:
    with pytest.raises(ConfigError, match="can't read some of its patches alone"):
        check_chosen_patches(backbone("DINOv3ViT"), 32)
    with pytest.raises(ConfigError, match="no patches that could be chosen"):
        patches_per_side(
            transformers.ResNetModel(transformers.ResNetConfig(depths=[1], hidden_sizes=[8])), 32
        )
    with pytest.raises(
        ConfigError, match="36 pixels a side are no whole number of patches of 8; use 32"
    ):
        patches_per_side(backbone("ViT"), 36)


@pytest.mark.heavy
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_tower_computes_as_many_tokens_as_are_kept(checkpointing: bool) -> None:
    """Counted products of a training step: those of blocks fall with the tokens, backward too."""
    config = small_config(image={"width": 32, "layers": 4, "heads": 2}, image_size=64, patch_size=8)
    model = build_two_tower(config, word_tokenizer())
    model.gradient_checkpointing(checkpointing)
    images = pixels(2, 64)
    counted = {}
    for kept in (64, 32, 16):
        ids = torch.arange(kept).expand(2, kept)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.image(images, kept=ids).sum().backward()
        counted[kept] = counter.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.image(images).sum().backward()
    assert counter.get_total_flops() == counted[64]

    # Of a block of width w, n tokens cost 24 n w^2 + 4 n^2 w (and thrice that with backward); the
    # embedding of all 64 patches is the same for any number.
    def blocks(tokens: int) -> int:
        return 24 * tokens * 32**2 + 4 * tokens**2 * 32

    fall = (counted[64] - counted[32]) / (counted[64] - counted[16])
    wanted = (blocks(65) - blocks(33)) / (blocks(65) - blocks(17))
    assert fall == pytest.approx(wanted, rel=0.01)
    assert counted[32] < 0.62 * counted[64]


def test_chosen_patches_reach_the_two_towers_and_their_gradients() -> None:
    """Of the embeddings of positions, those of patches that nobody reads learn nothing."""
    model = build_two_tower(small_config(image_size=32, patch_size=8), word_tokenizer())
    kept = torch.tensor([[[0, 5]], [[5, 9]], [[5, 15]], [[0, 9]]])
    batch = small_batch()._replace(more={"kept": kept})
    image = model(batch).image
    assert image is not None
    assert not torch.equal(image, model(batch._replace(more=None)).image)
    image.sum().backward()
    table = model.image.backbone.embeddings.position_embedding.weight.grad
    moved = table.abs().sum(1).nonzero().flatten().tolist()
    assert moved == [0, 1, 6, 10, 16]
