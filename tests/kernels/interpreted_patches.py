"""The loudest patches by Triton's interpreter, beside plain torch and float64.

`TRITON_INTERPRET=1 python -m tests.kernels.interpreted_patches` prints a row for each case: the
largest differences, and how many words have another winner.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from tests.kernels.interpreted import widen_bfloat16
from trainer.kernels.patch_maximum import best_patches, patch_maximum
from trainer.kernels.triton_patches import largest_scores
from trainer.kernels.way import Way

SHAPES = ((1, 1, 1, 1), (3, 5, 7, 9), (2, 70, 130, 40), (2, 64, 128, 64), (3, 129, 33, 100))
"""Images, patches, words and numbers; tiles have 64 patches, 128 words and 64 numbers."""
DTYPES = ("float32", "float16", "bfloat16")


class Case(NamedTuple):
    images: int
    patches: int
    words: int
    dim: int
    dtype: str
    activated: bool


def gradients_of(
    patches: Tensor, words: Tensor, probe: Tensor, activated: bool, way: Way
) -> tuple[Tensor, ...]:
    leaves = [part.clone().requires_grad_() for part in (patches, words)]
    value = patch_maximum(*leaves, activated=activated, block_words=11, way=way)
    (value * probe.to(value.dtype)).sum().backward()
    return value.detach(), *(leaf.grad for leaf in leaves)  # type: ignore[misc]


def differences(case: Case) -> dict[str, float]:
    draw = torch.Generator().manual_seed(case.words)
    dtype = getattr(torch, case.dtype)
    # What the operands' rounding does is the caller's choice, so it is done beforehand.
    patches, words = (
        torch.randn(*shape, generator=draw).to(dtype).float()
        for shape in ((case.images, case.patches, case.dim), (case.words, case.dim))
    )
    probe = 1e-6 * torch.randn(case.images, case.words, generator=draw)
    triton = Way(backend="triton", operand_dtype=dtype)
    ours = gradients_of(patches, words, probe, case.activated, triton)
    again = gradients_of(patches, words, probe, case.activated, triton)
    wanted = gradients_of(
        patches.double(), words.double(), probe.double(), case.activated, Way(backend="torch")
    )
    _, winner = best_patches(patches.double(), words.double(), 11)
    _, found = largest_scores(patches, words, dtype=dtype, activated=case.activated)
    names = ("value", "patches", "words")
    return {
        **{
            name: float((a - b).abs().max() / b.abs().max())
            for name, a, b in zip(names, ours, wanted, strict=True)
        },
        "winners": int((winner != found).sum()),
        "repeats": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)),
    }


def ties_and_holes() -> dict[str, object]:
    """Equal patches in one tile and in two, and a patch that is no number."""
    patches = torch.ones(1, 130, 4)
    way = Way(backend="triton", operand_dtype=torch.float32)
    _, winners = largest_scores(patches, torch.eye(4), dtype=torch.float32, activated=False)
    later = patches.clone()
    later[0, [70, 100, 128]] += 1
    _, second = largest_scores(later, torch.eye(4), dtype=torch.float32, activated=False)
    patches[0, 77, 2] = float("nan")
    value = patch_maximum(patches, torch.eye(4), way=way)
    return {
        "first": winners.tolist(),
        "second": second.tolist(),
        "broken": value.isnan().any(dim=1).tolist(),
        "empty": list(patch_maximum(patches, torch.eye(4)[:0], way=way).shape),
    }


def main() -> None:
    widen_bfloat16()
    for shape, dtype, activated in product(SHAPES, DTYPES, (False, True)):
        case = Case(*shape, dtype, activated)
        print(json.dumps({**case._asdict(), **differences(case)}), flush=True)
    print(json.dumps(ties_and_holes()))


if __name__ == "__main__":
    sys.exit(main())
