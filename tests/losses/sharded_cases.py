"""What every rank computes for the sharded multi-label losses: one launch per world size.

Gradients are those of the sum of the ranks' losses. Rows' come back divided by the ranks, as a
head does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from tests.losses.rank_cases import Arrays, golden, golden_names, leaf
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.kernels import one_pass
from trainer.kernels.way import Way
from trainer.losses.learned_prototypes import (
    ActiveRows,
    LogitOptions,
    Statistics,
    negative_figures,
    prototype_statistics,
    statistics_of_gathered,
)
from trainer.losses.margin import Margin, MarginKind
from trainer.losses.multilabel import MultilabelLoss, MultilabelOptions, multilabel_loss
from trainer.losses.one_pass import one_pass_multilabel_loss

PARTIAL_FC = golden_names("partial_fc/*.npz")
MULTILABEL = golden_names("mlcd/mlc*.npz")
SLOTS = golden_names("mlcd/ov8*.npz")
UNBOUNDED = "mlcd/mlcd_l8_s10.npz"
KINDS: tuple[MarginKind, ...] = ("cosine", "angular", "straight_through")


@cache
def results(world_size: int) -> list[dict[str, Arrays]]:
    """Every case on every rank of a group of this size, in rank order."""
    if world_size == 1:
        return [every_case(Comm.solo())]
    return run_ranks(every_case, world_size)


def every_case(comm: Comm) -> dict[str, Arrays]:
    cases: dict[str, Arrays] = {name: multilabel_case(comm, golden(name)) for name in MULTILABEL}
    cases["unbounded"] = unbounded_case(comm)
    for name in (*PARTIAL_FC, *SLOTS):
        if int(golden(name)["world_size"]) == comm.world_size:
            run = slots_case if name in SLOTS else partial_fc_case
            cases[name] = run(comm, golden(name))
    return cases


def active_rows(
    rows: Tensor, *, first: int, negatives: Tensor, positives: Tensor | None = None
) -> ActiveRows:
    """From this rank's whole shard, which starts at global row `first`, and global numbers."""
    last = first + len(rows)
    sampled = negatives[(negatives >= first) & (negatives < last)].unique()
    others = sampled[:0]
    if positives is not None:
        mine = positives[(positives >= first) & (positives < last)].unique()
        others = mine[~torch.isin(mine, sampled)]
    ids = torch.cat([sampled, others])
    return ActiveRows(rows[ids - first], ids, len(sampled))


def padded_share(comm: Comm, rows: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """This rank's rows of a global batch, filled up where the ranks can't have equally many."""
    size = -(-len(rows) // comm.world_size)
    mine = rows[comm.rank * size : (comm.rank + 1) * size]
    filler = rows.new_full((size - len(mine), *rows.shape[1:]), fill)
    present = torch.arange(size) < len(mine)
    return torch.cat([mine, filler]), present


def one_pass_case(
    features: Tensor,
    labels: Tensor,
    active: ActiveRows,
    comm: Comm,
    expected: MultilabelLoss,
    options: MultilabelOptions,
    *,
    present: Tensor | None = None,
) -> Arrays:
    """The same with gradients in the forward pass, in blocks of three; upstream is not one."""
    features, rows = leaf(features), leaf(active.rows)
    with patch.multiple(one_pass, BUFFER_BYTES=0, FEWEST_QUERIES=3, ROWS_PER_TILE=5):
        result = one_pass_multilabel_loss(
            *(features, labels, active._replace(rows=rows), comm, options), present=present
        )
    (result.loss * 3).backward()
    assert torch.equal(result.counted, expected.counted)
    torch.testing.assert_close(result.rows, expected.rows.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(result.figures, expected.figures, rtol=1e-11, atol=1e-13)
    return {
        "one_pass_loss": result.loss.detach().numpy(),
        "one_pass_features": features.grad.numpy() / 3,
        "one_pass_rows": rows.grad.numpy() / 3 / comm.world_size,
        "one_pass_ids": active.ids.numpy(),
    }


def multilabel_case(comm: Comm, arrays: Arrays) -> Arrays:
    """Unequal batches where the ranks don't divide eight rows; sampled rows, other positives."""
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}
    mine, present = padded_share(comm, tensors["features"], 0.5)
    labels, _ = padded_share(comm, tensors["labels"], -1)
    first, last = comm.row_range(len(tensors["weight"]))
    features, rows = leaf(mine), leaf(tensors["weight"][first:last])
    active = active_rows(
        rows,
        first=first,
        negatives=tensors["active_class_mask"].nonzero()[:, 0],
        positives=tensors["labels"],
    )
    options = MultilabelOptions(
        kind="mlcd" if "row_positive_term" in arrays else "mlc",
        margin=Margin(KINDS[int(arrays["margin_kind"])], float(arrays["margin"])),
        logits=LogitOptions(scale=float(arrays["scale"])),
    )
    tiled = options.logits._replace(way=Way(tile=(3, 7)))
    statistics = prototype_statistics(features, labels, active, comm, tiled, present=present)
    result = multilabel_loss(statistics, options)
    result.loss.backward()
    again = one_pass_case(
        *(mine, labels, active._replace(rows=active.rows.detach()), comm, result, options),
        present=present,
    )
    return {
        **again,
        "loss": result.loss.detach().numpy(),
        "row_loss": result.rows.detach()[statistics.present].numpy(),
        "grad_features": features.grad[present].numpy(),
        "grad_weight": rows.grad.numpy() / comm.world_size,
        **{f"row_{name}": value.numpy() for name, value in result.figures.items()},
    }


def unbounded_case(comm: Comm) -> Arrays:
    """A scale for which float32 has no fixed reference; repeated labels, uneven shards."""
    arrays = {name: torch.from_numpy(v) for name, v in golden(UNBOUNDED).items() if v.ndim}
    labels = arrays["labels"].clone()
    labels[::2, 1] = labels[::2, 0]
    first, last = comm.row_range(len(arrays["weight"]))
    features = leaf(padded_share(comm, arrays["features"][:6], 0.5)[0])
    rows = leaf(arrays["weight"][first:last])
    mine, present = padded_share(comm, labels[:6], -1)
    active = active_rows(rows, first=first, negatives=torch.arange(0, 60, 2), positives=labels)
    options = MultilabelOptions(logits=LogitOptions(scale=150.0))
    statistics = prototype_statistics(
        *(features, mine, active, comm, options.logits), present=present
    )
    result = multilabel_loss(statistics, options)
    result.loss.backward()
    return {
        "loss": result.loss.detach().numpy(),
        "grad_features": features.grad[present].numpy(),
        "grad_weight": rows.grad.numpy() / comm.world_size,
        **(
            {name: value.numpy() for name, value in _figures(features, mine, active, comm).items()}
            if comm.world_size != 4
            else {}
        ),
    }


def _figures(features: Tensor, labels: Tensor, active: ActiveRows, comm: Comm) -> dict[str, Tensor]:
    """Where every sample is real: six divide by all the sizes but four."""
    return negative_figures(features.detach(), labels, active, comm)


def shard(comm: Comm, arrays: Arrays) -> tuple[int, Tensor]:
    """As the originals split their table: the first ranks take the remainder."""
    first = int(arrays["class_start"][comm.rank])
    rows = arrays["weight"][first : first + int(arrays["num_local"][comm.rank])]
    return first, leaf(torch.from_numpy(rows).double())


def sampled(comm: Comm, arrays: Arrays, slot: int | None = None) -> Tensor:
    if "sampled_class_ids" not in arrays:
        return torch.arange(int(arrays["num_classes"]))
    ids = arrays["sampled_class_ids"][comm.rank]
    ids = torch.from_numpy(ids if slot is None else ids[slot]).long()
    return ids[ids >= 0]


def partial_fc_case(comm: Comm, arrays: Arrays) -> Arrays:
    first, rows = shard(comm, arrays)
    features = leaf(torch.from_numpy(arrays["features"][comm.rank]))
    labels = torch.from_numpy(arrays["labels"][comm.rank]).long()[:, None]
    active = active_rows(rows, first=first, negatives=sampled(comm, arrays))
    scale, ceiling = float(arrays["scale"]), float(arrays["interclass_filter"]) or None
    kept = torch.arange(features.shape[1])
    if "feature_ids" in arrays:
        kept = torch.from_numpy(arrays["feature_ids"][comm.rank]).long()
    active = active._replace(rows=active.rows[:, kept])
    logits = LogitOptions(scale=scale, ceiling=ceiling)
    if _diverges(arrays):
        statistics = _diverging_statistics(features, labels, active, kept, comm, logits)
    else:
        tiled = logits._replace(way=Way(tile=(5, 8)))
        statistics = prototype_statistics(features[:, kept], labels, active, comm, tiled)
    options = MultilabelOptions("slots", margin_of(arrays), logits=logits)
    result = multilabel_loss(statistics, options)
    result.loss.backward()
    again = {}
    if "feature_ids" not in arrays:
        detached = active._replace(rows=active.rows.detach())
        mine = features.detach()
        again = one_pass_case(mine, labels, detached, comm, result, options)
    return {
        **again,
        "row_loss": result.rows.detach().numpy(),
        "loss": result.loss.detach().numpy(),
        "grad_features": features.grad.numpy(),
        "grad_weight": rows.grad.numpy() / comm.world_size,
    }


def _diverges(arrays: Mapping[str, np.ndarray]) -> bool:
    return "feature_ids" in arrays and bool(
        np.any(arrays["feature_ids"][0] != arrays["feature_ids"])
    )


def _diverging_statistics(
    features: Tensor,
    labels: Tensor,
    active: ActiveRows,
    kept: Tensor,
    comm: Comm,
    logits: LogitOptions,
) -> Statistics:
    """The original's defect: each rank compares other coordinates of everybody's features."""
    everyones = comm.all_gather(features)[:, kept]
    unit = torch.nn.functional.normalize(everyones, dim=1)
    everyones_labels = comm.all_gather(labels)
    present = torch.ones(len(everyones_labels), dtype=torch.bool)
    return statistics_of_gathered(*(unit, everyones_labels, active, comm, logits), present=present)


def margin_of(arrays: Arrays) -> Margin:
    if float(arrays["margin_m3"]) > 0:
        return Margin("cosine", float(arrays["margin_m3"]))
    return Margin("straight_through", float(arrays["margin_m2"]))


def slots_case(comm: Comm, arrays: Arrays) -> Arrays:
    """Eight cross-entropies with a sample each, as published; ours shares one sample."""
    first, rows = shard(comm, arrays)
    features = leaf(torch.from_numpy(arrays["features"][comm.rank]).double())
    labels = torch.from_numpy(arrays["labels_used"][comm.rank]).long()
    scale, ceiling = float(arrays["scale"]), float(arrays["interclass_filter"]) or None
    slots: list[MultilabelLoss] = []
    for slot in range(labels.shape[1]):
        active = active_rows(rows, first=first, negatives=sampled(comm, arrays, slot))
        margin = Margin("cosine", float(arrays["margin_m3"]))
        options = MultilabelOptions("slots", margin, logits=LogitOptions(scale, ceiling))
        statistics = prototype_statistics(
            *(features, labels[:, slot : slot + 1], active, comm, options.logits)
        )
        slots.append(multilabel_loss(statistics, options))
    torch.stack([slot.loss for slot in slots]).mean().backward()
    return {
        "row_loss": torch.stack([slot.rows for slot in slots]).detach().numpy(),
        "grad_features": features.grad.numpy(),
        "grad_weight": rows.grad.numpy() / comm.world_size,
    }
