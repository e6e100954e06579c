"""The one door to the losses of sharded learnable prototypes: it picks how logits are computed.

On a CPU, gradients made in the forward pass are a third fewer products, where a block of logits
fits; tiles that are computed twice serve every other case there, and Triton's kernels a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.kernels.autotune import KernelSizes
from trainer.kernels.one_pass import serves_one_pass
from trainer.losses.learned_prototypes import ActiveRows, prototype_statistics
from trainer.losses.margin import Margin
from trainer.losses.multilabel import DEFAULT_MARGIN, LossKind, MultilabelLoss, multilabel_loss
from trainer.losses.one_pass import one_pass_multilabel_loss


class LogitOptions(NamedTuple):
    """What makes a loss of cosines, and how they are computed."""

    kind: LossKind = "mlcd"
    scale: float = 64.0
    """Of cosines."""
    margin: Margin = DEFAULT_MARGIN
    ceiling: float | None = None
    """Negatives of a higher cosine count as a logit of zero."""
    drop_unlabelled: bool = False
    """Leave samples without a label out of `mlcd`'s negative term too."""
    gather_dtype: torch.dtype | None = None
    """In which features travel; as they are where None."""
    kernel_sizes: KernelSizes = "fixed"


def prototype_loss(
    features: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, "batch labels"],
    active: ActiveRows,
    comm: Comm,
    options: LogitOptions,
    *,
    usual_negatives: int,
) -> MultilabelLoss:
    """The loss of one kind over the samples of all ranks, whose gradients can be asked for once.

    `usual_negatives` is about how many negatives a rank has active, and must be equal on all
    ranks: forms exchange different things, so the choice can't follow this step's own count.
    """
    in_one_pass = features.device.type == "cpu" and serves_one_pass(
        usual_negatives, features.shape[1], scale=options.scale
    )
    if in_one_pass:
        return one_pass_multilabel_loss(
            *(features, labels, active, comm),
            kind=options.kind,
            scale=options.scale,
            margin=options.margin,
            drop_unlabelled=options.drop_unlabelled,
            ceiling=options.ceiling,
            gather_dtype=options.gather_dtype,
        )
    statistics = prototype_statistics(
        *(features, labels, active, comm),
        scale=options.scale,
        ceiling=options.ceiling,
        gather_dtype=options.gather_dtype,
        kernel_sizes=options.kernel_sizes,
    )
    return multilabel_loss(
        statistics,
        kind=options.kind,
        scale=options.scale,
        margin=options.margin,
        drop_unlabelled=options.drop_unlabelled,
    )


def slots_loss(
    features: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, "batch labels"],
    active: Sequence[ActiveRows],
    comm: Comm,
    options: LogitOptions,
    *,
    usual_negatives: int,
) -> MultilabelLoss:
    """`slots` with negatives of its own for each column of labels: the mean over all labels.

    A sample's positives of other columns may be among the negatives, as in the published head of
    eight such cross-entropies (OneVision-Encoder). Costs as much as that many losses.
    """
    each = [
        prototype_loss(features, column, rows, comm, options, usual_negatives=usual_negatives)
        for column, rows in zip(labels.split(1, dim=1), active, strict=True)
    ]
    counted = torch.stack([slot.counted for slot in each], dim=1)
    shares = counted.sum(dim=0) / counted.sum().clamp_min(1)
    rows = torch.where(counted, torch.stack([slot.rows for slot in each], dim=1), 0.0)
    names = each[0].figures
    return MultilabelLoss(
        (torch.stack([slot.loss for slot in each]) * shares).sum(),
        rows.sum(dim=1) / counted.sum(dim=1).clamp_min(1),
        counted.any(dim=1),
        {name: (torch.stack([s.figures[name] for s in each]) * shares).sum() for name in names},
    )
