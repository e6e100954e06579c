"""The loudest patch of each word in plain torch: what exists meanwhile, and what is kept."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.memory import largest_intermediate, saved_elements
from trainer.errors import ConfigError
from trainer.kernels.patch_maximum import MOST_PATCHES, elu1p, patch_maximum
from trainer.kernels.way import Way

IMAGES, PATCHES, WORDS, DIM, BLOCK = 6, 40, 503, 8, 50
TORCH = Way(backend="torch")


def leaves() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((IMAGES, PATCHES, DIM), (WORDS, DIM))
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("activated", [False, True])
def test_scores_of_all_words_never_exist_forward_or_backward(activated: bool) -> None:
    """The dense form has a tensor of images x patches x words, and keeps it."""

    def ours() -> torch.Tensor:
        given = leaves()
        return patch_maximum(*given, activated=activated, block_words=BLOCK, way=TORCH)

    def dense() -> torch.Tensor:
        patches, words = leaves()
        scores = patches @ words.T
        return (elu1p(scores) if activated else scores).amax(dim=1)

    whole = IMAGES * PATCHES * WORDS
    assert largest_intermediate(lambda: dense().sum().backward()) >= whole
    most = largest_intermediate(lambda: ours().sum().backward())
    assert most == IMAGES * PATCHES * BLOCK < whole / 10
    kept = IMAGES * PATCHES * DIM + WORDS * DIM + IMAGES * WORDS * (2 if activated else 1)
    assert saved_elements(ours) == kept


def test_more_patches_than_a_winner_can_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="use smaller images or larger patches"):
        patch_maximum(torch.zeros(1, MOST_PATCHES + 1, 1), torch.zeros(2, 1))
    last = torch.zeros(1, MOST_PATCHES, 1)
    last[0, -1] = 1
    last.requires_grad_()
    patch_maximum(last, torch.ones(2, 1)).sum().backward()
    assert last.grad is not None
    assert last.grad[0, -1] == 2 == last.grad.sum()
