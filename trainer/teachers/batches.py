"""What is computed together: rows of like length, fewer of them where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate.utils.memory import (  # type: ignore[import-untyped]
    find_executable_batch_size,
    should_reduce_batch_size,
)
from jaxtyping import Float32
from torch import Tensor

from trainer.errors import DataError


def length_batches(lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Indices by falling length, in batches of at most `max_tokens` once padded (one at least)."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


class Budget:
    """Tokens of one forward pass; halved, for good, whenever the memory does not suffice.

    Not where it is `shared`, a pass that all ranks take together: a rank that fell out of step
    can't come back, so it ends its process with a sentence, and the launcher ends the others.
    """

    def __init__(self, tokens: int, *, shared: bool = False) -> None:
        self.tokens, self.shared = tokens, shared

    def run(
        self, lengths: Sequence[int], compute: Callable[[list[int]], Float32[Tensor, ...]]
    ) -> Float32[Tensor, "rows vectors dim"]:
        """`compute` of every batch of rows, put back into the order of the rows, on the CPU."""

        def attempt(max_tokens: int) -> Tensor:
            found: Tensor | None = None
            for batch in length_batches(lengths, max_tokens=max_tokens):
                vectors = compute(batch).cpu()
                if found is None:
                    found = torch.empty(len(lengths), *vectors.shape[1:])
                found[batch] = vectors
            assert found is not None
            return found

        try:
            if self.shared:
                return attempt(self.tokens)
            result: Tensor = find_executable_batch_size(
                attempt, starting_batch_size=self.tokens, reduce_batch_size_fn=self._halve
            )()
        except RuntimeError as error:
            if self.shared and should_reduce_batch_size(error):
                raise SystemExit(
                    f"error: {self.tokens} tokens or images do not fit in memory at once; the "
                    f"model is sharded, so set batch_tokens or batch_images to {self.tokens // 2}"
                ) from error
            if "No executable batch size" not in str(error):
                raise
            raise DataError("the teacher does not fit in memory, not even with one text") from error
        return result

    def _halve(self) -> int:
        self.tokens //= 2
        return self.tokens
