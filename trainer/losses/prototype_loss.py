"""The one door to the losses of sharded learnable prototypes: it picks how logits are computed.

On a CPU, gradients made in the forward pass are a third fewer products, where a block of logits
fits; tiles that are computed twice serve every other case there, and Triton's kernels a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.kernels.one_pass import serves_one_pass
from trainer.losses.learned_prototypes import ActiveRows, prototype_statistics
from trainer.losses.multilabel import MultilabelLoss, MultilabelOptions, multilabel_loss
from trainer.losses.one_pass import one_pass_multilabel_loss


def prototype_loss(
    features: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, "batch labels"],
    active: ActiveRows,
    comm: Comm,
    options: MultilabelOptions,
    *,
    usual_negatives: int,
) -> MultilabelLoss:
    """The loss of one kind over the samples of all ranks, whose gradients can be asked for once.

    `usual_negatives` is about how many negatives a rank has active, and must be equal on all
    ranks: forms exchange different things, so the choice can't follow this step's own count.
    """
    if serves_one_pass(
        *(usual_negatives, features.shape[1]),
        scale=options.logits.scale,
        way=options.logits.way,
        device=features.device,
    ):
        return one_pass_multilabel_loss(features, labels, active, comm, options)
    statistics = prototype_statistics(features, labels, active, comm, options.logits)
    return multilabel_loss(statistics, options)


def slots_loss(
    features: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, "batch labels"],
    active: Sequence[ActiveRows],
    comm: Comm,
    options: MultilabelOptions,
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
