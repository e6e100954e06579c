"""Training and test features with their classes, for what fits on one and tests on the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.config import EvalConfig
from trainer.evals.context import EvalContext, Wanted
from trainer.evals.features import embed_images
from trainer.evals.floors import chances, pixel_floor
from trainer.evals.labels import answers, class_ids, class_names, class_wanted, with_class
from trainer.evals.scores import NO_ANSWER
from trainer.recipe import Encode


class Splits(NamedTuple):
    """This rank's contiguous shares. Classes that can be learnt come first, test-only ones last."""

    train: Float[Tensor, "n dim"]
    train_labels: Int64[Tensor, " n"]
    train_ids: Int64[Tensor, " n"]
    test: Float[Tensor, "m dim"]
    answers: Int64[Tensor, "m most"]
    num_learnt: int
    """Classes of the training shards: what can be answered."""
    num_classes: int
    """With those that only the test shards have; their samples count as wrong."""


def load_splits(config: EvalConfig, encode: Encode, context: EvalContext) -> Splits:
    """Encode and label both sets of shards; `limit` holds for each of them."""
    comm, target = context.comm, config.target
    assert config.train is not None  # the configuration says so of what fits
    fit, test = (
        with_class(
            embed_images(spec, encode, context, limit=config.limit), target, spec=spec, comm=comm
        )
        for spec in (config.train, config.data)
    )
    known = class_names(fit, target, comm)
    unknown = sorted({*class_names(test, target, comm)} - {*known})
    ids = torch.tensor([r.sample_id for r in fit.records], dtype=torch.int64, device=comm.device)
    return Splits(
        train=fit.features,
        train_labels=class_ids(fit, target, known),
        train_ids=ids,
        test=test.features,
        answers=answers(test, target, known + unknown, comm),
        num_learnt=len(known),
        num_classes=len(known) + len(unknown),
    )


def wanted(config: EvalConfig) -> list[Wanted]:
    """Classes in both sets."""
    assert config.train is not None
    return [class_wanted(config, spec) for spec in (config.train, config.data)]


def floors(config: EvalConfig, splits: Splits, context: EvalContext) -> dict[str, float]:
    """Chance and pixel floor of the same split, and sizes; `unseen_classes` where there are any."""
    assert config.train is not None
    learnable = splits.answers.where(splits.answers < splits.num_learnt, NO_ANSWER)
    pixels = pixel_floor(
        config.data,
        config.train,
        target=config.target,
        limit=config.limit,
        bank_limit=config.limit,
        data=context.data,
        comm=context.comm,
        check=context.check,
    )
    num_unseen = splits.num_classes - splits.num_learnt
    unseen = {"unseen_classes": float(num_unseen)} if num_unseen else {}
    return {**chances(learnable, splits.num_learnt, context.comm), **pixels, **unseen}
