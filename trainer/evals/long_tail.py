"""Zero-shot accuracy by how often the pretraining captions name a class: head, torso, tail, unseen.

After "Let it Wag!" (arXiv 2404.04125, section 6): a mean over classes of any frequency hides that
rare ones are hardly known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from trainer.concepts import Bank, Counts
from trainer.concepts.count import BANK, COUNTS
from trainer.config import EvalConfig
from trainer.errors import DataError
from trainer.evals.context import EvalContext, Wanted
from trainer.evals.features import embed_images, embed_texts
from trainer.evals.labels import answers, class_names, class_wanted, with_class
from trainer.evals.scores import chance, percent
from trainer.evals.zero_shot import classifier, prompts, rank_classes
from trainer.recipe import Encode

SLICES = ("unseen", "tail", "torso", "head")


class PerClass(NamedTuple):
    """Of the classes that occur; the same on every rank."""

    names: list[str]
    right: Int64[Tensor, " classes"]
    samples: Int64[Tensor, " classes"]
    chance: float
    """Percent of samples that a uniform guess names right."""


def run(config: EvalConfig, encode: Encode, context: EvalContext) -> dict[str, float]:
    """`top1/SLICE` over a slice's samples, beside its chance; `tail_gap`, head less tail."""
    found = per_class(config, encode, context)
    frequency = frequencies(config, found.names)
    figures: dict[str, float] = {}
    for name in SLICES:
        own = [i for i, count in enumerate(frequency) if slice_of(count, config.slices) == name]
        if own:
            samples = int(found.samples[own].sum())
            figures |= {
                f"top1/{name}": percent(int(found.right[own].sum()), samples),
                f"chance/{name}": found.chance,
                f"classes/{name}": float(len(own)),
                f"samples/{name}": float(samples),
            }
    return {**_of_all(found), **figures, **_gap(figures)}


def wanted(config: EvalConfig) -> list[Wanted]:
    """Classes in the shards; and that the counts can be read."""
    assert config.concepts is not None
    counts_of(config.concepts)[1].frequency(config.frequency)
    return [class_wanted(config, config.data)]


def per_class(config: EvalConfig, encode: Encode, context: EvalContext) -> PerClass:
    """How many samples of each class the prompts of all classes name right, over all ranks."""
    comm = context.comm
    share = embed_images(config.data, encode, context, limit=config.limit)
    share = with_class(share, config.target, spec=config.data, comm=comm)
    names = class_names(share, config.target, comm)
    vectors = embed_texts(prompts(names, config.templates), encode, context)
    classes = classifier(vectors.view(len(names), len(config.templates), -1))
    right = answers(share, config.target, names, comm)
    hit = (rank_classes(share.features, classes)[:, :1] == right).any(dim=1)
    own = right[:, 0]
    return PerClass(
        names,
        comm.sum(torch.bincount(own[hit], minlength=len(names))).cpu(),
        comm.sum(torch.bincount(own, minlength=len(names))).cpu(),
        chance((right >= 0).sum(dim=1), num_choices=len(names), num_guesses=1, comm=comm),
    )


def counts_of(folder: Path) -> tuple[Bank, Counts]:
    """What `tools/concepts.py count` has written; DataError where the two do not fit."""
    (counts, _), bank = Counts.open(folder / COUNTS), Bank.open(folder / BANK)
    if len(bank) != len(counts.image):
        raise DataError(
            f"{folder} has counts of {len(counts.image)} concepts and a bank of {len(bank)}; count "
            "anew"
        )
    return bank, counts


def frequencies(config: EvalConfig, names: Sequence[str]) -> list[int]:
    """The count of each class, by name; DataError where the bank lacks one."""
    assert config.concepts is not None
    bank, counts = counts_of(config.concepts)
    by_name = dict(zip(bank.names, counts.frequency(config.frequency).tolist(), strict=True))
    if lacking := [name for name in names if name not in by_name]:
        raise DataError(
            f"{config.concepts} has no count of {len(lacking)} of {len(names)} classes, as "
            f"{lacking[0]!r}; put all class names into the bank and count anew"
        )
    return [by_name[name] for name in names]


def slice_of(frequency: int, slices: tuple[int, int]) -> str:
    torso, head = slices
    if frequency == 0:
        return "unseen"
    return "head" if frequency >= head else "torso" if frequency >= torso else "tail"


def _of_all(found: PerClass) -> dict[str, float]:
    """Over all samples; and over those classes, a tenth of all, that are known worst."""
    shares = (100.0 * found.right / found.samples.clamp(min=1)).sort()[0].tolist()
    worst = shares[: math.ceil(len(shares) / 10)]
    return {
        "top1": percent(int(found.right.sum()), int(found.samples.sum())),
        "chance": found.chance,
        "mean_per_class": math.fsum(shares) / len(shares),
        "worst_tenth_of_classes": math.fsum(worst) / len(worst),
    }


def _gap(figures: Mapping[str, float]) -> dict[str, float]:
    ends = ("top1/head", "top1/tail")
    return {"tail_gap": figures[ends[0]] - figures[ends[1]]} if set(ends) <= set(figures) else {}
