"""What a pretended GPU refuses and counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.virtual_gpu.device import DeviceError, VirtualGpu, virtual_gpu


@pytest.fixture
def gpu() -> Iterator[VirtualGpu]:
    with virtual_gpu({}) as gpu:
        yield gpu


def test_tensors_say_where_they_are(gpu: VirtualGpu) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert not here.is_cuda
    assert there.is_cuda
    assert there.device.type == "cuda"
    assert there.new_zeros(2).is_cuda
    assert (there * 2)[1:].view(-1).is_cuda
    assert here.to("cuda").is_cuda
    assert not there.cpu().is_cuda
    assert torch.zeros_like(there).is_cuda


def test_gradients_come_back_to_where_the_tensor_is(gpu: VirtualGpu) -> None:
    leaf = torch.ones(3, requires_grad=True)
    (leaf.to("cuda") * torch.full((3,), 2.0, device="cuda")).sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.is_cuda
    assert leaf.grad.tolist() == [2.0] * 3


MIXES: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "sum": lambda here, there: here + there,
    "product": lambda here, there: torch.mm(here[None], there[:, None]),
    "cat": lambda here, there: torch.cat([here, there]),
    "indices": lambda here, there: here[there.long()],
    "numpy": lambda here, there: there.numpy(),
    "pinned": lambda here, there: there.pin_memory(),
}


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_of_devices_is_refused(gpu: VirtualGpu, name: str) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    with pytest.raises(DeviceError, match=r"tests/virtual_gpu/test_device.py:\d+"):
        MIXES[name](here, there)
    assert (there + torch.tensor(1.0)).is_cuda, "a number may come from anywhere"


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda there: there.sum().item(),
    "if": lambda there: bool((there > 0).any()),
    "tolist": lambda there: there.tolist(),
    "mask": lambda there: there[there > 0],
    "nonzero": lambda there: there.nonzero(),
    "unique": lambda there: there.unique(),
    "cpu": lambda there: there.cpu(),
    "constant": lambda there: there.new_tensor([1.0]),
    "sent": lambda there: torch.ones(2).to("cuda"),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_counted_where_they_are(gpu: VirtualGpu, name: str) -> None:
    there = torch.ones(3, device="cuda")
    assert gpu.waits == []
    WAITS[name](there)
    assert [wait.place.partition(":")[0] for wait in gpu.waits] == [
        "tests/virtual_gpu/test_device.py"
    ]


def test_what_a_device_does_alone_is_no_wait(gpu: VirtualGpu) -> None:
    there = torch.ones(3, device="cuda")
    there[torch.arange(2, device="cuda")] = 1.0
    torch.where(there > 0, there, 0.0).sum().square()
    torch.ones(2).to("cuda", non_blocking=True)
    there[there > 5] = 0.0  # one number under a mask needs no places
    assert gpu.waits == []
    assert gpu.num_launches > 4


def test_collectives_refuse_what_nccl_would(gpu: VirtualGpu) -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        dist.all_reduce(torch.ones(2, device="cuda"))
        for wrong in (
            torch.ones(2),
            torch.ones(2, dtype=torch.int16, device="cuda"),
            torch.ones(4, 4, device="cuda").T[1:],
        ):
            with pytest.raises(DeviceError):
                dist.all_reduce(wrong)
    finally:
        dist.destroy_process_group()
