"""How many kernels the losses launch at production sizes, on tensors without numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.launches import launches_of
from trainer.comm import Comm
from trainer.losses.contrastive import info_nce
from trainer.losses.multi_positive import multi_positive_nce, multi_positive_sigmoid
from trainer.losses.sigmoid import sigmoid_loss

BATCH, DIM, TEXTS = 512, 512, 3
Loss = Callable[[Tensor, Tensor, Tensor, Comm], Tensor]
LOSSES: dict[str, Loss] = {
    "info_nce": lambda image, text, scale, comm: info_nce(image, text[:, 0], scale, comm),
    "sigmoid": lambda image, text, scale, comm: sigmoid_loss(image, text[:, 0], scale, scale, comm),
    "multi_positive_sigmoid": lambda image, text, scale, comm: multi_positive_sigmoid(
        image, text, scale, scale, comm
    ),
    "multi_positive_nce": multi_positive_nce,
}


def launches(loss: Loss, num_ranks: int) -> int:
    dist.init_process_group("fake", rank=1, world_size=num_ranks, store=FakeStore())
    comm = Comm(1, num_ranks, torch.device("cpu"), dist.group.WORLD)
    try:
        with FakeTensorMode():
            image = torch.empty(BATCH, DIM, requires_grad=True)
            text = torch.empty(BATCH, TEXTS, DIM)
            scale = torch.ones((), requires_grad=True)
            return launches_of(lambda: loss(image, text, scale, comm).backward())
    finally:
        dist.destroy_process_group()


@pytest.mark.heavy
@pytest.mark.parametrize("name", LOSSES)
def test_launches_do_not_grow_with_the_ranks(name: str) -> None:
    """At 512 rows a rank, forward and backward: blocks are of pairs, of which 64 ranks have a few;
    one block a rank took 1,616 launches of the sigmoid loss."""
    few, many = launches(LOSSES[name], 8), launches(LOSSES[name], 64)
    assert many <= 220
    assert many <= 4 * few
