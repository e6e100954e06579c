"""A GPU that is not there: numbers on the CPU, in storages that know on which device they would be.

Two modes do it. One answers for tensors where Python asks for or names a device; the other sees
every operation on its way to its kernel, carries the tags on, and refuses what a GPU or NCCL would
refuse. Where the host would wait for the device, the line of the program is noted.

What it can't know: memory, time, and tensors that C++ makes from nothing, which count as on either
device. A copy to the device that says `non_blocking` counts as no wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"),
    *("unique_consecutive", "bincount", "equal", "is_nonzero", "histc"),
}
"""Operations whose result's shape, or the result itself, the host has to know."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
MAY_MIX = INDEXING | {"copy_", "_to_copy", "set_", "detach", "alias", "lift_fresh"}
NOT_SENT = (torch.int16, torch.complex64, torch.complex128)
"""Types that NCCL does not have."""
FACTORIES = {
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.eye, torch.linspace),
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.tensor, torch.as_tensor),
    *(torch.empty_strided, torch.scalar_tensor, torch.tril_indices, torch.triu_indices),
}
FROM_HOST = {"tensor", "as_tensor", "new_tensor"}
"""They copy what Python holds: from pageable memory, so the host waits."""


class DeviceError(RuntimeError):
    """What a GPU, NCCL or a kernel would refuse."""


class Wait(NamedTuple):
    """The host waited for the device."""

    place: str
    """file:line of the program."""
    kind: str


class VirtualGpu:
    """Which storages lie on the device, and what happened."""

    def __init__(self) -> None:
        self._on_device: dict[int, StorageWeakRef] = {}
        self._anywhere: dict[int, StorageWeakRef] = {}
        self.waits: list[Wait] = []
        self.num_launches = 0
        self.host_groups: set[str] = set()
        """Names of process groups that travel over hosts and take CPU tensors."""
        self.quiet = 0
        """Above zero nothing is looked at."""

    def has(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._on_device

    def put(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._on_device[storage._cdata] = StorageWeakRef(storage)
        self._anywhere.pop(storage._cdata, None)
        return tensor

    def take(self, tensor: Tensor) -> Tensor:
        self._on_device.pop(_storage(tensor), None)
        self._anywhere.pop(_storage(tensor), None)
        return tensor

    def leave_open(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._on_device.pop(storage._cdata, None)
        self._anywhere[storage._cdata] = StorageWeakRef(storage)

    def is_open(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._anywhere

    def wait(self, kind: str) -> None:
        self.waits.append(Wait(place(), kind))

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        self.quiet += 1
        try:
            yield
        finally:
            self.quiet -= 1

    def since(self, count: int) -> list[Wait]:
        return self.waits[count:]


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def place() -> str:
    """file:line of the innermost line of the program that is being run."""
    frame, test = sys._getframe(1), None
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(f"{ROOT}/trainer/"):
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        if test is None and file.startswith(f"{ROOT}/tests/") and file != __file__:
            test = f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return test or "nowhere"


class Operations(TorchDispatchMode):
    """Sees operations on their way to the kernels."""

    def __init__(self, gpu: VirtualGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        gpu, name = self.gpu, function._schema.name.partition("::")[2]
        if gpu.quiet:
            return function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if function.namespace == "c10d":
            self._check_collective(name, args, tensors)
            return function(*args, **kwargs)
        on_device = [tensor for tensor in tensors if gpu.has(tensor)]
        if on_device:
            self._check(name, args, tensors)
            gpu.num_launches += not function.is_view
        result = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            if all(gpu.is_open(given) for given in tensors):
                gpu.leave_open(tensor)
            elif on_device and (name != "copy_" or gpu.has(args[0])) and not gpu.has(tensor):
                gpu.put(tensor)
        return result

    def _check(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        gpu = self.gpu
        if name in WAITING:
            gpu.wait(name)
        for tensor in tensors:
            if gpu.is_open(tensor):
                gpu.put(tensor)
        elsewhere = [tensor for tensor in tensors if not gpu.has(tensor)]
        if name in INDEXING:
            self._check_indices(name, args)
        elif name == "copy_" and elsewhere:
            gpu.wait("copy to the device" if gpu.has(args[0]) else "copy to the host")
        elif name not in MAY_MIX and any(tensor.dim() for tensor in elsewhere):
            shapes = [tuple(tensor.shape) for tensor in elsewhere]
            raise DeviceError(f"{place()}: {name} of tensors on both devices; on the CPU {shapes}")

    def _check_indices(self, name: str, args: Any) -> None:
        gpu = self.gpu
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if not gpu.has(args[0]):
            raise DeviceError(f"{place()}: indices on the device into a tensor on the CPU")
        if not all(gpu.has(index) for index in indices):
            gpu.wait("indices from the host")
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        if masks and (name == "index" or args[2].numel() != 1):
            gpu.wait("a mask's places")

    def _check_collective(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        if any(_group_name(value) in self.gpu.host_groups for value in args):
            return
        for tensor in tensors:
            if not self.gpu.has(tensor) and not self.gpu.is_open(tensor):
                raise DeviceError(f"{place()}: {name} of a tensor on the CPU, {tensor.shape}")
            if tensor.dtype in NOT_SENT:
                raise DeviceError(f"{place()}: {name} of {tensor.dtype}, which NCCL has not")
            if not tensor.is_contiguous():
                raise DeviceError(f"{place()}: {name} of a tensor that is not contiguous")


def _group_name(value: Any) -> str | None:
    try:
        return str(dist.ProcessGroup.unbox(value).group_name)
    except (RuntimeError, TypeError, AttributeError):
        return None


class _Copy(torch.autograd.Function):
    """A tensor on the other device, whose gradient comes back to this one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gpu: VirtualGpu, to_device: bool) -> Tensor:
        ctx.gpu, ctx.to_device = gpu, to_device
        with gpu.unwatched():
            copy = value.detach().clone()
        return gpu.put(copy) if to_device else gpu.take(copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Copy.apply(gradients[0], ctx.gpu, not ctx.to_device), None, None


class Names(TorchFunctionMode):
    """Answers where Python asks on which device a tensor is, or says where one shall be."""

    def __init__(self, gpu: VirtualGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if self.gpu.quiet:
            return function(*args, **kwargs)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "__get__" and first is not None:
            return self._property(function, first)
        if function in FACTORIES or name.startswith("new_") or name.endswith("_like"):
            return self._made(function, name, args, kwargs)
        if first is None:
            return function(*args, **kwargs)
        special: Callable[..., Any] | None = getattr(self, f"_{name}", None)
        if special is not None:
            return special(function, *args, **kwargs)
        if "out_dtype" in kwargs:
            return self._product(function, args, kwargs)
        return function(*args, **kwargs)

    def _property(self, function: Any, tensor: Tensor) -> Any:
        here = self.gpu.has(tensor)
        answers = {Tensor.device: CUDA, Tensor.is_cuda: True, Tensor.is_cpu: False}
        for asked, answer in answers.items():
            if here and function is asked.__get__:  # type: ignore[attr-defined]
                return answer
        if here and function.__self__ in answers:
            return answers[function.__self__]
        return function(tensor)

    def _made(self, function: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        said = _device(kwargs.get("device"))
        like = args[0] if args and isinstance(args[0], Tensor) else None
        inherits = like is not None and (name.startswith("new_") or name.endswith("_like"))
        there = said.type == "cuda" if said else bool(inherits and self.gpu.has(like))
        if said is not None and said.type != "meta":
            kwargs["device"] = CPU
        if name == "as_tensor" and like is not None:
            with self:
                return like.to(said or like.device, kwargs.get("dtype") or like.dtype)
        if there and name in FROM_HOST:
            self.gpu.wait(f"{name} from the host")
        with self.gpu.unwatched():
            made = function(*args, **kwargs)
        self.gpu.num_launches += there
        return self.gpu.put(made) if there else self.gpu.take(made)

    def _to(self, function: Any, tensor: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        device, dtype = _device(kwargs.get("device")), kwargs.get("dtype")
        for value in rest:
            if isinstance(value, Tensor):
                device, dtype = CUDA if self.gpu.has(value) else CPU, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif _device(value) is not None:
                device = _device(value)
        later = kwargs.get("non_blocking", False) or any(value is True for value in rest)
        if device is not None and device.type == "meta":
            return function(tensor, *rest, **kwargs)
        to_device = device is not None and device.type == "cuda"
        if device is not None and to_device != self.gpu.has(tensor):
            if not (to_device and later):
                self.gpu.wait("copy to the device" if to_device else "copy to the host")
            tensor = _Copy.apply(tensor, self.gpu, to_device)
        return tensor if dtype in (None, tensor.dtype) else function(tensor, dtype)

    def _cpu(self, function: Any, tensor: Tensor, **kwargs: Any) -> Tensor:
        return self._to(Tensor.to, tensor, CPU)

    def _cuda(self, function: Any, tensor: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return self._to(Tensor.to, tensor, CUDA, **kwargs)

    def _pin_memory(self, function: Any, tensor: Tensor, *rest: Any) -> Tensor:
        if self.gpu.has(tensor):
            raise DeviceError(f"{place()}: only memory of the host can be pinned")
        return tensor

    def _numpy(self, function: Any, tensor: Tensor, **kwargs: Any) -> Any:
        if self.gpu.has(tensor):
            raise DeviceError(f"{place()}: a tensor on the device is no array of NumPy")
        return function(tensor, **kwargs)

    def _tolist(self, function: Any, tensor: Tensor) -> Any:
        if self.gpu.has(tensor):
            self.gpu.wait("tolist")
        with self.gpu.unwatched():
            return function(tensor)

    def _get_device(self, function: Any, tensor: Tensor) -> int:
        return 0 if self.gpu.has(tensor) else -1

    def _backward(
        self, function: Any, tensor: Tensor, gradient: Any = None, **options: Any
    ) -> None:
        """Not torch's own, which is in Python, so that this mode would be off inside of it."""
        with self:
            gradient = torch.ones_like(tensor) if gradient is None else gradient
            torch.autograd.graph._engine_run_backward(
                *((tensor,), (gradient,), bool(options.get("retain_graph")), False),
                inputs=(),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def _product(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Of halves with a float32 result, which the CPU has not."""
        dtype, out = kwargs.pop("out_dtype"), kwargs.pop("out", None)
        if not all(factor.dtype in (torch.float16, torch.bfloat16) for factor in args[-2:]):
            raise DeviceError(f"{place()}: out_dtype is for products of halves")
        result: Tensor = function(*(value.to(dtype) for value in args), **kwargs)
        return result if out is None else out.copy_(result)


def _device(value: Any) -> torch.device | None:
    if isinstance(value, torch.device):
        return value
    if isinstance(value, str) and value.partition(":")[0] in ("cuda", "cpu", "meta"):
        return torch.device(value)
    return None


class _Kernel:
    """A Triton kernel in the interpreter, behind a check of what it is given."""

    def __init__(self, gpu: VirtualGpu, kernel: Any) -> None:
        self.gpu, self.kernel = gpu, kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **constants: Any) -> None:
            for value in args:
                if isinstance(value, Tensor) and not (
                    self.gpu.has(value) or self.gpu.is_open(value)
                ):
                    raise DeviceError(f"{place()}: a kernel is given {value.shape} on the CPU")
            self.gpu.num_launches += 1
            with (
                self.gpu.unwatched(),
                _disable_current_modes(),
                torch._C.DisableTorchFunction(),
            ):
                self.kernel[grid](*args, **constants)

        return run


@contextmanager
def virtual_gpu(kernels: dict[Any, tuple[str, ...]]) -> Iterator[VirtualGpu]:
    """Inside, tensors can be on "cuda"; `kernels` are the names of Triton kernels by module."""
    gpu = VirtualGpu()
    with ExitStack() as stack:
        for module, names in kernels.items():
            for name in names:
                kernel = _Kernel(gpu, getattr(module, name))
                stack.enter_context(patch.object(module, name, kernel))
        for name, answer in CUDA_ANSWERS.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        # It asks C++ for devices of tensors.
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        stack.enter_context(patch.dict(checks, default=lambda _: None))
        stack.enter_context(Names(gpu))
        stack.enter_context(Operations(gpu))
        yield gpu


CUDA_ANSWERS: dict[str, Callable[..., Any]] = {
    "_lazy_init": lambda: None,
    "get_device_capability": lambda device=None: (9, 0),
    "max_memory_allocated": lambda device=None: 0,
    "get_device_name": lambda device=None: "pretended",
    "synchronize": lambda device=None: None,
}
