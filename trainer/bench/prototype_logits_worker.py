"""One shape of the prototype-logit benchmark: `prototype_logits.py` starts it."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from trainer.bench.memory import peak_bytes, peak_resident_bytes
from trainer.bench.prototype_logits import PASSES, LogitsCase, Pass
from trainer.kernels.one_pass import fits_one_pass, gradients_in_one_pass
from trainer.kernels.prototype_logits import prototype_logits

SCALE = 64.0
WHOLE = 1 << 30
BOUND_TILES = {"cpu": ((WHOLE, 1024), (128, 2048)), "cuda": ((WHOLE, 1 << 15),)}
"""Queries and rows of one bare product, of which the faster counts: which is best in a processor's
cache depends on the shape."""


class Result(NamedTuple):
    """The mean loss, and its gradients where they were asked for."""

    loss: Tensor
    of_features: Tensor | None = None
    of_rows: Tensor | None = None


Side = Callable[[Tensor, Tensor, Tensor, bool], Result]
"""Of unit features, unit rows, labels, and whether gradients are wanted."""


def ours(features: Tensor, rows: Tensor, labels: Tensor, backward: bool) -> Result:
    """As the recipes choose: one pass where its buffer is bounded, kernels on a GPU."""
    fits = fits_one_pass(rows.shape[0], rows.shape[1], rows.element_size())
    if backward and fits and not features.is_cuda:
        return _in_one_pass(features, rows, labels)
    return _differentiated(_streamed, features, rows, labels, backward)


def naive(features: Tensor, rows: Tensor, labels: Tensor, backward: bool) -> Result:
    return _differentiated(_materialised, features, rows, labels, backward)


def side_named(name: str) -> Side | None:
    """None where the package is not installed."""
    if name in {"ours", "naive"}:
        return {"ours": ours, "naive": naive}[name]
    if name == "compile":
        loss_of: Any = torch.compile(_materialised, dynamic=False)
    else:
        try:
            package = importlib.import_module("cut_cross_entropy")
        except ImportError:
            return None

        def loss_of(features: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
            loss: Tensor = package.linear_cross_entropy(
                features * SCALE, rows, labels, impl="torch_compile"
            )
            return loss

    return lambda features, rows, labels, backward: _differentiated(
        loss_of, features, rows, labels, backward
    )


def _materialised(features: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(SCALE * features @ rows.T, labels)


def _streamed(features: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    log_negatives, cosines = prototype_logits(features, rows, labels[:, None], scale=SCALE)
    return _from_sums(log_negatives, cosines).mean()


def _from_sums(log_negatives: Tensor, cosines: Tensor) -> Tensor:
    """log(e^N + e^z) - z of each sample."""
    return torch.nn.functional.softplus(log_negatives - SCALE * cosines[:, 0])


def _in_one_pass(features: Tensor, rows: Tensor, labels: Tensor) -> Result:
    losses = []

    def upstream(_: slice, log_negatives: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor]:
        losses.append(_from_sums(log_negatives, cosines))
        push = torch.sigmoid(log_negatives - SCALE * cosines[:, 0]) / len(features)
        return push, -SCALE * push[:, None]

    gradients = gradients_in_one_pass(
        *(features, rows, labels[:, None], upstream), scale=SCALE, num_negatives=len(rows)
    )
    return Result(torch.cat(losses).mean(), *gradients)


def _differentiated(
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    features: Tensor,
    rows: Tensor,
    labels: Tensor,
    backward: bool,
) -> Result:
    if not backward:
        with torch.no_grad():
            return Result(loss_of(features, rows, labels))
    leaves = features.detach().requires_grad_(), rows.detach().requires_grad_()
    loss = loss_of(*leaves, labels)
    return Result(loss.detach(), *torch.autograd.grad(loss, leaves))


def bare_products(features: Tensor, rows: Tensor, backward: bool, tile: tuple[int, int]) -> None:
    """The products that every implementation makes, and nothing else: one, or three."""
    of_features, of_rows = (
        torch.zeros_like(features),
        torch.empty_like(rows if backward else rows[:0]),
    )
    for first in range(0, len(features), tile[0]):
        queries, pulled = features[first : first + tile[0]], of_features[first : first + tile[0]]
        logits = features.new_empty(min(tile[1], len(rows)), len(queries))
        for start in range(0, len(rows), tile[1]):
            part = slice(start, start + tile[1])
            there = logits[: len(rows[part])]
            torch.mm(rows[part], queries.T, out=there)
            if backward:
                pulled.addmm_(there.T, rows[part], beta=0.5)
                of_rows[part].addmm_(there, queries, beta=0.5 if first else 0.0)


class Lap(NamedTuple):
    clock: float
    cpu: float


def measure(case: LogitsCase) -> list[dict[str, Any]]:
    torch.set_num_threads(case.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features, rows, labels = problem(case, device)
    peak = _sgemm_peak(device)
    sides = {name: side_named(name) for name in case.sides}
    too_large = case.batch * case.prototypes * features.element_size() > case.most_logit_bytes
    return [
        row
        for which in PASSES
        for row in _of_pass(which, sides, features, rows, labels, case, peak, too_large=too_large)
    ]


def problem(case: LogitsCase, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(case.batch, case.dim, generator=generator))
    rows = normalize(torch.randn(case.prototypes, case.dim, generator=generator))
    labels = torch.randint(case.prototypes, (case.batch,), generator=generator)
    return features.to(device), rows.to(device), labels.to(device)


def _of_pass(
    which: Pass,
    sides: dict[str, Side | None],
    features: Tensor,
    rows: Tensor,
    labels: Tensor,
    case: LogitsCase,
    peak: Lap,
    *,
    too_large: bool,
) -> list[dict[str, Any]]:
    backward = which == "forward+backward"
    works: dict[str, Callable[[], object]] = {
        f"bound {tile}": partial(bare_products, features, rows, backward, tile)
        for tile in BOUND_TILES[features.device.type]
    }
    absent = {}
    for name, side in sides.items():
        if side is None:
            absent[name] = "not installed"
        elif too_large and name != "ours":
            absent[name] = "the matrix of logits is too large"
        else:
            works[name] = partial(side, features, rows, labels, backward)
    extra = {}
    for name, work in works.items():
        work()  # what is compiled or found out at the first call
        extra[name] = _peak(work, features.device) - (rows.nbytes if backward else 0)
    laps = _laps(works, case.rounds, features.device)
    column = 0 if features.is_cuda else 1
    bound = min(lap[column] for name, lap in laps.items() if name.startswith("bound"))
    flops = (3 if backward else 1) * 2 * case.batch * case.prototypes * case.dim
    shared = {
        **case.model_dump(include={"batch", "prototypes", "dim", "threads"}),
        "pass": which,
        "device": features.device.type,
        "load": round(os.getloadavg()[0], 1),
    }
    result = []
    for name in sides:
        row: dict[str, Any] = {"name": name, **shared}
        if name in absent:
            result.append({**row, "seconds": None, "extra_bytes": None, "why": absent[name]})
            continue
        lap = laps[name]
        row |= {"seconds": lap.clock, "cpu_seconds": lap.cpu, "extra_bytes": max(0, extra[name])}
        row |= {"bound_seconds": bound, "bound_share": round(bound / lap[column], 3)}
        row |= {"peak_share": round(flops / lap[column] * peak[column], 3)}
        result.append(row)
    return result


def _laps(
    works: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, Lap]:
    """The least time of each; they take turns, in both directions."""
    laps: dict[str, list[Lap]] = {name: [] for name in works}
    for turn in range(rounds):
        for name in sorted(works, reverse=bool(turn % 2)):
            laps[name].append(_timed(works[name], device))
    return {name: Lap(*map(min, zip(*found, strict=True))) for name, found in laps.items()}


def _timed(work: Callable[[], object], device: torch.device) -> Lap:
    _wait(device)
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    _wait(device)
    return Lap(time.perf_counter() - clock, time.process_time() - cpu)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(work: Callable[[], object], device: torch.device) -> int:
    """Compiled code allocates without telling torch, so on a CPU the process is asked."""
    if device.type == "cuda":
        return peak_bytes(work, device)
    return peak_resident_bytes(work)


def _sgemm_peak(device: torch.device, size: int = 2048) -> Lap:
    """Seconds per FLOP in products of square float32 matrices."""
    one, other = torch.rand(2, size, size, device=device)
    out = torch.empty_like(one)
    laps = [_timed(lambda: torch.mm(one, other, out=out), device) for _ in range(5)]
    return Lap(*(min(column) / (2 * size**3) for column in zip(*laps, strict=True)))


def main() -> None:
    rows = measure(LogitsCase.model_validate_json(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
