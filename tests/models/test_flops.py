"""FLOPs counted from the layers against those that torch counts while it multiplies."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.models.small import small_batch, small_config, word_tokenizer
from trainer.models.flops import TrainingFlops
from trainer.models.two_tower import HeadConfig, build_two_tower


def test_flops_of_two_towers_and_heads_are_those_of_the_products_that_torch_makes() -> None:
    """Forward and backward; a frozen image tower is gone through once."""
    for frozen in (False, True):
        config = small_config(head=HeadConfig(hidden=24, dim=8, norm="layer"))
        model = build_two_tower(config, word_tokenizer(), seed=1)
        for tower in (model.image, model.text):
            tower.backbone.set_attn_implementation("eager")
        if frozen:
            model.image.requires_grad_(False)
        counted = TrainingFlops(model)
        assert counted.per_micro_batch is None
        with FlopCounterMode(display=False) as truth:
            features = model(small_batch(6))
            rows = [value for value in features.tensors().values() if value.dim() == 2]
            torch.stack([value.sum() for value in rows]).sum().backward()
        assert counted.per_micro_batch == truth.get_total_flops()


def test_a_second_pass_is_not_counted_and_leaves_no_hook() -> None:
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=16
        )
    )
    counted = TrainingFlops(model)
    model(torch.zeros(2, 3, 32, 32))
    once = counted.per_micro_batch
    model(torch.zeros(2, 3, 32, 32))
    assert once
    assert counted.per_micro_batch == once
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("rows", [1, 5])
def test_flops_grow_with_the_rows(rows: int) -> None:
    model = build_two_tower(small_config(), word_tokenizer(), seed=1)
    counts = []
    for batch in (small_batch(1), small_batch(rows)):
        counted = TrainingFlops(model)
        model(batch)
        counts.append(counted.per_micro_batch or 0)
    assert counts[1] == rows * counts[0] > 0
