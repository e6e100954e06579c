"""How many FLOPs a model's matrix products take for one micro-batch of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class TrainingFlops:
    """Watches a module's first forward pass, and counts what training on its rows takes.

    A product of [n, k] and [k, m] is 2 n k m FLOPs. Counted are linear layers, convolutions and the
    two products of an attention (a causal one as if it were whole), forward once and backward for
    what is trained: once for the weights, once more for the inputs where anything below them is
    trained. Not counted are norms, activations, the loss, prototype heads, and whatever is
    computed twice (checkpointing, a second pass of micro-batches): the model's FLOPs, not the
    machine's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forward = self._forward_and_backward = 0
        self._trained: set[str] = set()
        self._handles: list[RemovableHandle] = [model.register_forward_hook(self._end)]
        for name, module in model.named_modules():
            counter = _counter(module)
            if counter is not None or any(True for _ in module.parameters(recurse=False)):
                hook = self._hook(counter, name.partition(".")[0].removesuffix("_head"))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    @property
    def per_micro_batch(self) -> int | None:
        """FLOPs of one micro-batch on one rank; None before the first pass has ended."""
        return None if self._handles else self._forward_and_backward

    @property
    def forward(self) -> int:
        """Those of them that the forward pass alone takes."""
        return self._forward

    def _hook(self, count: Callable[..., int] | None, tower: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            below = tower in self._trained
            trained = any(weight.requires_grad for weight in module.parameters(recurse=False))
            times = 1 + below + (below if _is_attention(module) else trained)
            if count is not None:
                products = count(module, inputs, named, output)
                self._forward += products
                self._forward_and_backward += times * products
            if trained:
                self._trained.add(tower)

        return hook

    def _end(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _counter(module: nn.Module) -> Callable[..., int] | None:
    if isinstance(module, nn.Linear):
        return _of_linear
    if isinstance(module, nn.Conv2d):
        return _of_convolution
    return _of_attention if _is_attention(module) else None


def _is_attention(module: nn.Module) -> bool:
    """As transformers writes one: it has the sizes of its heads, and layers that make queries."""
    name = type(module).__name__
    return name.endswith("Attention") and any(
        isinstance(getattr(module, size, None), int) for size in ("head_dim", "attention_head_size")
    )


def _of_linear(module: nn.Linear, inputs: Any, named: Any, output: Tensor) -> int:
    return 2 * output.numel() * module.in_features


def _of_convolution(module: nn.Conv2d, inputs: Any, named: Any, output: Tensor) -> int:
    height, width = module.kernel_size
    return 2 * output.numel() * (module.in_channels // module.groups) * height * width


def _of_attention(module: nn.Module, inputs: Any, named: Any, output: Any) -> int:
    """Queries with keys, and weights with values: of every head, each place with each."""
    states = inputs[0] if inputs else named["hidden_states"]
    batch, places, width = states.shape
    size = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    assert isinstance(size, int)
    config = getattr(module, "config", None)
    heads = getattr(module, "num_heads", None) or getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        heads = width // size
    return 4 * int(batch) * int(places) ** 2 * heads * size
