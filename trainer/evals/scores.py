"""From ranked guesses to percentages: hits are counted as integers, so ranks only add them up."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int64
from torch import Tensor

from trainer.comm import Comm

NO_ANSWER = -1
"""Fills up rows of answers; no guess equals it."""


def tally(
    ranked: Int64[Tensor, "n k"],
    answers: Int64[Tensor, "n m"],
    *,
    num_classes: int,
    comm: Comm,
) -> dict[str, float]:
    """Top-1, top-5 and mean-per-class accuracy over all ranks, in percent.

    `ranked` are class ids, best guess first, for this rank's samples. A guess is right when it is
    among the row's answers (padded with NO_ANSWER); the first answer is the class that the sample
    counts for in `mean_per_class`, the unweighted mean over the classes that occur. `top5` is
    left out where there are fewer than five guesses.
    """
    right = (ranked[:, :, None] == answers[:, None, :]).any(dim=2) & (ranked >= 0)
    own = answers[:, 0]
    hits = _count(own[right[:, 0]], num_classes, comm)
    totals = _count(own, num_classes, comm)
    samples = int(totals.sum())
    figures = {"top1": percent(int(hits.sum()), samples)}
    if ranked.shape[1] >= 5:
        hits5 = _count(own[right[:, :5].any(dim=1)], num_classes, comm)
        figures["top5"] = percent(int(hits5.sum()), samples)
    occurring = [(h, t) for h, t in zip(hits.tolist(), totals.tolist(), strict=True) if t]
    shares = math.fsum(percent(h, t) for h, t in occurring)
    return {**figures, "mean_per_class": shares / max(len(occurring), 1)}


def percent(part: int | float, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def chance(
    num_right: Int64[Tensor, " n"], *, num_choices: int, num_guesses: int, comm: Comm
) -> float:
    """Percent of queries that distinct uniform guesses answer right, over all ranks.

    Query i has `num_right[i]` right answers among `num_choices`; the mean over queries of
    1 - C(choices - right, guesses) / C(choices, guesses).
    """
    counts = _count(num_right, num_choices + 1, comm).tolist()
    shares = [
        count * _chance_of_hit(right, num_choices, num_guesses)
        for right, count in enumerate(counts)
        if count
    ]
    return percent(math.fsum(shares), sum(counts))


def _chance_of_hit(num_right: int, num_choices: int, num_guesses: int) -> float:
    missed = 1.0
    for guess in range(min(num_guesses, num_choices)):
        missed *= max(num_choices - num_right - guess, 0) / (num_choices - guess)
    return 1.0 - missed


def _count(values: Tensor, size: int, comm: Comm) -> Tensor:
    """How often each of 0..size-1 occurs, over all ranks."""
    return comm.sum(torch.bincount(values, minlength=size))
