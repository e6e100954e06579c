"""Steps of a sharded head on every rank, and the same steps on one whole table in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.losses.learned_prototypes import LogitOptions, prototype_statistics
from trainer.losses.margin import NO_MARGIN
from trainer.losses.multilabel import MultilabelOptions, multilabel_loss
from trainer.losses.one_pass import one_pass_multilabel_loss
from trainer.losses.prototype_loss import slots_loss
from trainer.parts.initial_rows import normal_rows
from trainer.parts.prototype_head import PrototypeHead, PrototypeHeadConfig
from trainer.parts.sampling import sampled_ids

SEED, DIM, BATCH, LABELS, STEPS, SCALE = 11, 6, 7, 3, 4, 10.0
"""Seven samples: no number of ranks from two to four gives all of them equally many."""
OPTIONS = MultilabelOptions(logits=LogitOptions(SCALE))
SGD = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.02, "weight_decay": 0.1}
"""Of which rows that learn a few at a time and a whole table are the same."""
CASES: dict[str, dict[str, Any]] = {
    "sampled": {"sample_rate": 0.4},
    "all rows": {"sample_rate": 1.0},
    "positives only": {"sample_rate": 0.0, "union_positives": True},
    "no negatives": {"sample_rate": 0.0},
    "union": {"sample_rate": 0.4, "union_positives": True},
    "logq": {"sample_rate": 0.4, "logq": True},
    "union logq": {"sample_rate": 0.4, "union_positives": True, "logq": True},
    "clipped": {"sample_rate": 0.4, "clip_norm": 0.3},
    "dense": {"sample_rate": 0.4, "dense": True},
    "offload": {"sample_rate": 0.4, "offload": True},
    "one pass": {"sample_rate": 0.4},
    "fewer rows than ranks": {"sample_rate": 0.5},
    "blocks": {"sample_rate": 0.5, "sampling": "blocks"},
}
COUNTS = {"fewer rows than ranks": 3, "blocks": 700}


def count_of(name: str) -> int:
    return COUNTS.get(name, 17)


def config_of(name: str, **changes: Any) -> PrototypeHeadConfig:
    options = SGD | CASES[name] | changes
    if options["optimizer"] == "adamw":
        del options["momentum"]
    return PrototypeHeadConfig(**options)


def new_head(
    comm: Comm, config: PrototypeHeadConfig, count: int, seed: int = SEED
) -> PrototypeHead:
    return PrototypeHead(config, num_prototypes=count, dim=DIM, comm=comm, seed=seed)


def batch_of(step: int, count: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Features and labels of a global batch: some labels missing, one sample without any."""
    generator = torch.Generator().manual_seed(100 + step)
    features = torch.randn(size, DIM, generator=generator, dtype=torch.float64)
    labels = torch.rand(size, max(count, LABELS), generator=generator).argsort(1)[:, :LABELS]
    labels = labels.masked_fill(labels >= count, -1)
    labels[0, 1:] = -1
    labels[2] = -1
    return features, labels


def share_of(comm: Comm, rows: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """This rank's rows, filled up to the length that all ranks have; which are real."""
    size = -(-len(rows) // comm.world_size)
    mine = rows[comm.rank * size : (comm.rank + 1) * size]
    filler = rows.new_full((size - len(mine), *rows.shape[1:]), fill)
    return torch.cat([mine, filler]), torch.arange(size) < len(mine)


def factor(step: int) -> float:
    return 1.0 / (1 + step)


def take_step(
    head: PrototypeHead,
    features: Tensor,
    labels: Tensor,
    present: Tensor,
    step: int,
    *,
    one_pass: bool = False,
) -> tuple[float, Tensor]:
    """One step on this rank's samples; the loss, and the gradient of the features."""
    features = features.float().requires_grad_()
    active = head.active(labels, step)
    if one_pass:
        result = one_pass_multilabel_loss(
            features, labels, active, head.comm, OPTIONS, present=present
        )
    else:
        statistics = prototype_statistics(
            features, labels, active, head.comm, OPTIONS.logits, present=present
        )
        result = multilabel_loss(statistics, OPTIONS)
    result.loss.backward()
    assert features.grad is not None
    head.after_step(step, applied=head.gradients_finite(), learning_rate_factor=factor(step))
    return float(result.loss.detach()), features.grad[present]


def whole_state(head: PrototypeHead) -> dict[str, Tensor]:
    """Rows and what belongs to each, of the whole table; on every rank."""
    return {name: head.comm.gather_rows(value).clone() for name, value in head._fields().items()}


def sharded_steps(comm: Comm, name: str, **changes: Any) -> dict[str, Any]:
    head = new_head(comm, config_of(name, **changes), count_of(name))
    start = head.comm.gather_rows(head.rows).clone()
    losses, gradients, figures = [], [], []
    for step in range(STEPS):
        everyones_features, everyones_labels = batch_of(step, count_of(name))
        features, present = share_of(comm, everyones_features, 0.5)
        labels, _ = share_of(comm, everyones_labels, -1)
        loss, gradient = take_step(
            head, features, labels, present, step, one_pass=name == "one pass"
        )
        losses.append(loss)
        gradients.append(gradient)
        figures.append({key: float(value) for key, value in head.figures().items()})
    head._optimizer.settle(None)
    return {
        "start": start,
        "range": head.row_range,
        "losses": losses,
        "gradients": torch.stack([comm.gather_rows(gradient) for gradient in gradients]),
        "figures": figures,
        **whole_state(head),
    }


def rank_mean_steps(comm: Comm, group_size: int) -> dict[str, Any]:
    """By a loss that no file here has: the mean over this rank's own samples of eight."""
    head = new_head(comm, config_of("all rows", group_size=group_size), 16)
    for step in range(STEPS):
        features, labels = batch_of(step, 16, 8)
        mine = features.chunk(comm.world_size)[comm.rank].float()
        own = labels.clamp_min(0).chunk(comm.world_size)[comm.rank]
        rows = normalize(head.active(own, step).rows)
        everyones = head.comm.all_gather(normalize(mine))
        logits = head.comm.all_gather((SCALE * everyones @ rows.T).T.contiguous()).T
        loss = cross_entropy(logits.chunk(head.comm.world_size)[head.comm.rank], own[:, 0])
        loss.backward()
        head.after_step(step, applied=head.gradients_finite(), learning_rate_factor=1.0)
    head._optimizer.settle(None)
    return {"rows": head.comm.gather_rows(head.rows).clone()}


def rank_mean_on_one_table() -> Tensor:
    """The same steps of plain SGD, by nothing of the head's."""
    rows = normal_rows(0, 16, DIM, deviation=0.01, seed=SEED).double().requires_grad_()
    optimizer = torch.optim.SGD([rows], lr=SGD["learning_rate"], weight_decay=SGD["weight_decay"])
    for step in range(STEPS):
        features, labels = batch_of(step, 16, 8)
        optimizer.zero_grad()
        logits = SCALE * normalize(features) @ normalize(rows).T
        cross_entropy(logits, labels.clamp_min(0)[:, 0]).backward()
        optimizer.step()
    return rows.detach().float()


def own_negative_steps(comm: Comm) -> dict[str, Any]:
    """A cross-entropy for each column of labels, with a draw of negatives for each."""
    head, losses = new_head(comm, config_of("union"), 17), []
    for step in range(STEPS):
        features, labels = (
            rows.chunk(comm.world_size)[comm.rank] for rows in batch_of(step, 17, 8)
        )
        active = head.active_each(labels, step)
        options = OPTIONS._replace(kind="slots", margin=NO_MARGIN)
        result = slots_loss(features.float(), labels, active, head.comm, options, usual_negatives=8)
        result.loss.backward()
        losses.append(float(result.loss.detach()))
        head.after_step(step, applied=head.gradients_finite(), learning_rate_factor=1.0)
    head._optimizer.settle(None)
    return {"losses": losses, "rows": head.comm.gather_rows(head.rows).clone()}


@cache
def own_negatives_on_one_table() -> dict[str, Any]:
    """The same by its definition: each label of a sample against its column's negatives."""
    config, losses = config_of("union"), []
    rows = normal_rows(0, 17, DIM, deviation=0.01, seed=SEED).double().requires_grad_()
    optimizer = torch.optim.SGD([rows], lr=SGD["learning_rate"], weight_decay=SGD["weight_decay"])
    how = {"rate": config.sample_rate, "sampling": config.sampling, "seed": SEED}
    for step in range(STEPS):
        features, labels = batch_of(step, 17, 8)
        cosines = normalize(features) @ normalize(rows).T
        each = []
        for slot, column in enumerate(labels.T):
            drawn = set(sampled_ids(0, 17, step=step, slot=slot, **how).tolist())
            drawn |= set(column[column >= 0].tolist())
            for i, own in enumerate(column.tolist()):
                if own >= 0:
                    others = sorted(drawn - {own})
                    logits = SCALE * cosines[i, [own, *others]]
                    each.append(logits.logsumexp(0) - logits[0])
        loss = torch.stack(each).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "rows": rows.detach().float()}


def every_case(comm: Comm) -> dict[str, dict[str, Any]]:
    cases = {name: sharded_steps(comm, name) for name in CASES}
    if comm.world_size != 3:
        cases["own negatives"] = own_negative_steps(comm)
        cases["rank mean"] = rank_mean_steps(comm, group_size=0)
        cases["rank mean in groups"] = rank_mean_steps(comm, group_size=-(-comm.world_size // 2))
    return cases


@cache
def results(world_size: int) -> list[dict[str, dict[str, Any]]]:
    if world_size == 1:
        return [every_case(Comm.solo())]
    return run_ranks(every_case, world_size)


# -- the same on one table, with every logit in a matrix ----------------------------------------


def dense_loss(
    features: Tensor, labels: Tensor, rows: Tensor, step: int, config: PrototypeHeadConfig
) -> Tensor:
    """MLCD by its definition, a sample at a time, over sets of row numbers."""
    count = len(rows)
    sampled = set(
        sampled_ids(
            *(0, count),
            rate=config.sample_rate,
            sampling=config.sampling,
            seed=SEED,
            step=step,
        ).tolist()
    )
    positives = set(labels[labels >= 0].tolist())
    negatives = sampled | positives if config.union_positives else sampled
    cosines = normalize(features) @ normalize(rows).T
    total = features.new_zeros(())
    for i in range(len(features)):
        own = [k for k in labels[i].tolist() if k >= 0]
        pull = sum((-SCALE * (cosines[i, k] - 0.3)).exp() for k in own)
        push = features.new_zeros(())
        for j in negatives - set(own):
            forced = config.union_positives and j in positives
            weight = 1.0 if forced or not config.logq else 1 / config.sample_rate
            push = push + weight * (SCALE * cosines[i, j]).exp()
        total = total + torch.log1p(torch.as_tensor(pull)) + torch.log1p(push)
    return total / len(features)


@cache
def dense_steps(name: str, num_groups: int = 1) -> dict[str, Any]:
    """Plain SGD on the whole table; the objective is the mean over groups of samples."""
    config, count = config_of(name), count_of(name)
    rows = normal_rows(0, count, DIM, deviation=0.01, seed=SEED).double().requires_grad_()
    optimizer = torch.optim.SGD([rows], lr=1.0, weight_decay=config.weight_decay)
    losses, gradients = [], []
    for step in range(STEPS):
        features, labels = batch_of(step, count, BATCH if num_groups == 1 else 8)
        features.requires_grad_()
        groups = zip(features.chunk(num_groups), labels.chunk(num_groups), strict=True)
        each = [dense_loss(*group, rows, step, config) for group in groups]
        loss = torch.stack(each).mean()
        optimizer.zero_grad()
        loss.backward()
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_([rows], config.clip_norm)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor(step)
        optimizer.step()
        losses.append(loss.item())
        gradients.append(features.grad)
    return {
        "losses": losses,
        "gradients": torch.stack(gradients).float(),
        "rows": rows.detach().float(),
    }
