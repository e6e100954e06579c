"""What each rank runs in test_terms.py."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tuning.store_cases import all_trained
from trainer.comm import Comm
from trainer.tuning.head import BatchNorm
from trainer.tuning.spectra import moments_of, spectrum
from trainer.tuning.terms import consistency, covariance, dominance


def rows_of(count: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(count * dim)
    tuned, frozen = torch.randn(2, count, dim, generator=draw, dtype=torch.float64)
    return tuned + 0.5, frozen


def terms(comm: Comm, count: int, dim: int) -> dict[str, torch.Tensor]:
    """Values, and gradients for all rows of the mean over ranks; batch norm and a spectrum too."""
    first, last = comm.row_range(count)  # the last ranks may have fewer rows, or none
    tuned, frozen = (rows[first:last] for rows in rows_of(count, dim))
    found: dict[str, torch.Tensor] = {}
    for name, term in {
        "rows": lambda z: consistency(z, frozen, mean="rows", comm=comm),
        "elements": lambda z: consistency(z, frozen, mean="elements", comm=comm),
        "covariance": lambda z: covariance(z, comm=comm),
        "top1": lambda z: dominance(z, top=1, comm=comm),
        "top5": lambda z: dominance(z, top=5, comm=comm),
        "norm": lambda z: comm.sum((BatchNorm(dim).double()(z, comm) * frozen).tanh().sum()),
    }.items():
        leaf = tuned.clone().requires_grad_()
        value = term(leaf)
        value.backward()
        found[name] = value.detach()
        found[f"{name} gradient"] = comm.gather_rows(leaf.grad / comm.world_size)
    moments = moments_of([tuned[:2], tuned[2:]], dim=dim, rows="unit").over(comm)
    found["spectrum"] = spectrum(moments).singular_values
    return found


def everything(comm: Comm, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Two batches of terms, one of them with fewer rows than numbers, and whole trainings."""
    sizes = {"terms of 9 x 12": (9, 12), "terms of 13 x 5": (13, 5)}
    return {name: terms(comm, *size) for name, size in sizes.items()} | all_trained(comm, folder)
