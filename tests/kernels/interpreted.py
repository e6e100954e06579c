"""Runs the Triton kernels on a CPU, through Triton's interpreter, against float64.

A program of its own, because the interpreter has to be chosen before Triton is imported:
`TRITON_INTERPRET=1 python -m tests.kernels.interpreted` prints one JSON row a case.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.kernels.naive import Problem, naive_logits, pulled_back, ragged_problem
from trainer.kernels import autotune, triton_logits
from trainer.kernels.autotune import KernelSizes
from trainer.kernels.launches import KEEPING, STORING, SUMMING
from trainer.kernels.log_partition import log_partition
from trainer.kernels.prototype_logits import prototype_logits
from trainer.kernels.way import Way


class Case(NamedTuple):
    queries: int
    rows: int
    dim: int
    labels: int
    dtype: str = "float32"
    scale: float = 64.0
    ceiling: float | None = None
    biased: bool = False
    extra: int = 0
    sizes: KernelSizes = "fixed"
    kept_gib: float = 0.0


CASES = (
    Case(1, 1, 8, 1),
    Case(3, 17, 12, 2, biased=True),
    Case(130, 300, 72, 8, ceiling=0.2, biased=True, extra=5),
    Case(130, 300, 72, 3, scale=100.0, extra=5),
    Case(70, 129, 64, 0, scale=10.0),
    Case(129, 260, 24, 2, dtype="float16", scale=64.0),
    Case(129, 260, 24, 2, dtype="float16", scale=100.0, biased=True),
    Case(129, 260, 24, 2, dtype="bfloat16", scale=64.0),
    Case(4, 0, 8, 2, extra=3),
    Case(70, 129, 64, 2, sizes="timed"),
    Case(1, 1, 8, 1, kept_gib=1.0),
    Case(130, 300, 72, 8, ceiling=0.2, biased=True, extra=5, kept_gib=1.0),
    Case(130, 300, 72, 3, scale=78.0, extra=5, kept_gib=1.0),
    Case(129, 260, 24, 2, dtype="float16", kept_gib=1.0),
    Case(129, 260, 24, 2, dtype="bfloat16", kept_gib=1.0),
    Case(4, 0, 8, 2, extra=3, kept_gib=1.0),
    Case(70, 129, 64, 2, sizes="timed", kept_gib=1.0),
    # Queries that stay on the chip, in either form of the backward pass.
    Case(130, 70, 256, 8, ceiling=0.1, biased=True, extra=5),
    Case(66, 40, 512, 3, biased=True, kept_gib=1.0),
    Case(66, 40, 512, 3, scale=100.0),
)
SIZES_CASE = Case(130, 300, 72, 8, ceiling=0.2, biased=True, extra=5)
"""Rows of which no tile is a divisor, and more than one block of queries."""


def widen_bfloat16() -> None:
    """The interpreter multiplies bfloat16 by its bit patterns, as integers: make it numbers."""
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):
        return original(self, _widened(a), _widened(b), d, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _widened(handle):
    if handle.data.dtype != np.uint16:
        return handle
    values = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(values, interpreter.tl.float32)


def problem_of(case: Case) -> Problem:
    problem = ragged_problem(case.queries, case.rows, case.dim, case.labels, extra=case.extra)
    problem = problem if case.biased else problem._replace(bias=None)
    for upstream in problem.upstream:
        upstream.mul_(1 / 3000)
    dtype = getattr(torch, case.dtype)
    # Rounding of the operands is the caller's choice; here it is what the kernels do with them.
    return problem._replace(
        queries=problem.queries.to(dtype).double(), rows=problem.rows.to(dtype).double()
    )


def by_kernels(case: Case, problem: Problem) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs and gradients in float32."""
    leaves = tuple(x.detach().float().requires_grad_() for x in (problem.queries, problem.rows))
    found = prototype_logits(
        *(*leaves, problem.positives),
        scale=case.scale,
        num_negatives=case.rows,
        bias=None if problem.bias is None else problem.bias.float(),
        ceiling=case.ceiling,
        way=Way(
            backend="triton",
            operand_dtype=getattr(torch, case.dtype),
            kernel_sizes=case.sizes,
            kept_gib=case.kept_gib,
        ),
    )
    return found, pulled_back(found, problem, leaves)


def errors(case: Case) -> dict[str, float]:
    """Largest absolute error of the outputs, and of the gradients relative to their largest."""
    problem = problem_of(case)
    found, gradients = by_kernels(case, problem)
    exact = problem.queries.requires_grad_(), problem.rows.requires_grad_()
    expected = naive_logits(problem, scale=case.scale, ceiling=case.ceiling)
    wanted = pulled_back(expected, problem, exact)
    same = torch.equal(found[0].isinf(), expected[0].isinf())
    difference = (found[0].double() - expected[0]).nan_to_num(posinf=0, neginf=0).abs()
    return {
        "value": difference.max().item() if same else float("inf"),
        "cosine": (found[1].double() - expected[1]).abs().amax().item() if case.labels else 0.0,
        **{
            name: (
                (ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
            ).item()
            for name, ours, theirs in zip(("queries", "rows"), gradients, wanted, strict=True)
        },
    }


class PartitionCase(NamedTuple):
    """Rows of any length, some not valid, and a scale that learns (ProtoCLIP's)."""

    queries: int
    rows: int
    dim: int
    dtype: str = "float32"
    scale: float = 100.0
    sizes: KernelSizes = "fixed"


PARTITION_CASES = (
    PartitionCase(3, 17, 12),
    PartitionCase(130, 300, 72),
    PartitionCase(129, 260, 24, dtype="float16"),
    PartitionCase(4, 0, 8),
    PartitionCase(40, 70, 16, sizes="timed"),
)


def partition_errors(case: PartitionCase) -> dict[str, float]:
    """As `errors`, of `log_partition` and its three gradients."""
    draw = torch.Generator().manual_seed(case.queries)
    dtype = getattr(torch, case.dtype)
    queries = torch.nn.functional.normalize(
        torch.randn(case.queries, case.dim, generator=draw, dtype=torch.float64), dim=1
    )
    lengths = torch.rand(case.rows, 1, generator=draw, dtype=torch.float64)
    rows = torch.randn(case.rows, case.dim, generator=draw, dtype=torch.float64)
    rows = (torch.nn.functional.normalize(rows, dim=1) * lengths).to(dtype).double()
    # A power of two: multiplied in, it rounds nothing.
    scale = torch.tensor(2.0 ** round(np.log2(case.scale)), dtype=torch.float64)
    queries = queries.to(dtype).double()
    valid = torch.rand(case.rows, generator=draw) < 0.7
    upstream = torch.randn(case.queries, generator=draw, dtype=torch.float64) / 3000
    exact = tuple(leaf.requires_grad_() for leaf in (queries, scale, rows))
    dense = (scale * queries @ rows.T).masked_fill(~valid, -torch.inf).logsumexp(dim=1)
    wanted = torch.autograd.grad((dense * upstream).nan_to_num(neginf=0).sum(), exact)
    leaves = tuple(leaf.detach().float().requires_grad_() for leaf in exact)
    way = Way(backend="triton", operand_dtype=dtype, kernel_sizes=case.sizes)
    before = len(autotune._FASTEST)
    ours = log_partition(*leaves, valid=valid, way=way)
    same = torch.equal(ours.isinf(), dense.isinf())
    found = torch.autograd.grad((ours * upstream.float()).nan_to_num(neginf=0).sum(), leaves)
    # Timed sizes are remembered, of both passes; fixed ones never looked for.
    assert len(autotune._FASTEST) - before == (2 if case.sizes == "timed" else 0)
    names = ("queries", "scale", "rows")
    difference = (ours.double() - dense).nan_to_num(posinf=0, neginf=0).abs().max().item()
    return {"value": difference if same else float("inf")} | {
        name: _relative(one, other) for name, one, other in zip(names, found, wanted, strict=True)
    }


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if not theirs.numel():
        return 0.0
    largest = theirs.abs().max().clamp_min(1e-30)
    return ((ours.double() - theirs.nan_to_num()).abs().max() / largest).item()


def errors_of_all_sizes() -> list[dict[str, Any]]:
    """Of every size that some architecture may run; warps and stages mean nothing here."""
    tables = (SUMMING, STORING, KEEPING)
    listed = [one for table in tables for some in table.values() for one in some]
    distinct = {(one.queries, one.rows, one.dim): one for one in listed}
    rows = []
    for launch in distinct.values():
        here = {"sm90": (launch,)}
        keeping = any(launch in some for some in KEEPING.values())
        for case in (SIZES_CASE, SIZES_CASE._replace(kept_gib=1.0))[: 1 + keeping]:
            with (
                patch.dict(SUMMING, here),
                patch.dict(STORING, here),
                patch.dict(KEEPING, here),
            ):
                rows.append({"case": {**case._asdict(), "launch": launch}})
                rows[-1]["errors"] = errors(case)
    return rows


def repeats(case: Case) -> bool:
    """Whether a second call has the same bits."""
    problem = problem_of(case)
    calls = [by_kernels(case, problem) for _ in range(2)]
    tensors = [[*outputs, *gradients] for outputs, gradients in calls]
    return all(torch.equal(one, other) for one, other in zip(*tensors, strict=True))


def main() -> None:
    widen_bfloat16()
    # Several blocks of queries, the last one short, and several splits of the rows.
    triton_logits.BLOCK_QUERIES, triton_logits.PROGRAMS = (64, 64), 4
    for case in CASES:
        print(json.dumps({"case": case._asdict(), "errors": errors(case)}), flush=True)
    for one in PARTITION_CASES:
        print(json.dumps({"case": one._asdict(), "errors": partition_errors(one)}), flush=True)
    for row in errors_of_all_sizes():
        print(json.dumps(row), flush=True)
    for one in (SIZES_CASE, SIZES_CASE._replace(kept_gib=1.0)):
        print(json.dumps({"case": one._asdict(), "repeats": repeats(one)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
