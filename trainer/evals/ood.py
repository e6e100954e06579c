"""Out-of-distribution detection: is a sample of the training set's kind, or from outside?

Each score is fitted on the training shards; `data` is inside, each of `outside` is compared with
it. Nothing is chosen by looking at outside samples. One that shows the same picture as a sample
inside, byte for byte, is no outside sample and is left out; `shared/SET` says how many there were.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.errors import DataError
from trainer.evals.context import EvalContext, Wanted
from trainer.evals.features import Share, embed_images, embed_texts
from trainer.evals.labels import class_ids, class_names, class_wanted, with_class
from trainer.evals.linear_probe import choose_penalty
from trainer.evals.logistic import fitted, with_ones
from trainer.evals.ood_scores import fit_gaussian, separation
from trainer.evals.search import nearest
from trainer.evals.splits import Splits
from trainer.evals.zero_shot import classifier, prompts
from trainer.recipe import Encode

ZERO_SHOT_SCALE = 100.0
"""Of cosines before a softmax, as public CLIP evaluations take it, whatever the model learnt."""
NEIGHBOUR = 50
"""The k-th nearest training sample is looked at; the last one where there are fewer."""

Score = Callable[[Float[Tensor, "n dim"]], Float64[Tensor, " n"]]


class Inside(NamedTuple):
    """This rank's share of the training samples."""

    features: Float[Tensor, "n dim"]
    labels: Int64[Tensor, " n"]
    ids: Int64[Tensor, " n"]
    names: list[str]
    pictures: set[str]
    """Of all ranks."""


def run(config: EvalConfig, encode: Encode, context: EvalContext) -> dict[str, float]:
    """`SCORE_auroc/SET` and `SCORE_fpr95/SET`, `_aupr_in`, `_aupr_out`, `_error`; percent."""
    comm = context.comm
    inside = _training(config, encode, context)
    found_of = {
        name: embed_images(spec, encode, context, limit=config.limit)
        for name, spec in {"": config.data, **config.outside}.items()
    }
    known = _pictures(found_of[""], comm) | inside.pictures
    shares, shared = {"": found_of[""].features}, dict[str, int]()
    for name, spec in config.outside.items():
        shares[name], shared[name] = _outside(found_of[name], known, spec, comm)
    figures: dict[str, float] = {}
    for kind in config.scores:
        score = _score(kind, inside, config, encode, context)
        found = {name: comm.gather_rows(score(rows)) for name, rows in shares.items()}
        for name in config.outside:
            figures |= {
                f"{kind}_{key}/{name}": value
                for key, value in separation(found[""], found[name])._asdict().items()
            }
    count = {name: len(scores) for name, scores in found.items()}
    for name in config.outside:
        figures |= {
            f"chance_auroc/{name}": 50.0,
            f"chance_fpr95/{name}": 95.0,
            f"inside/{name}": float(count[""]),
            f"outside/{name}": float(count[name]),
            f"shared/{name}": float(shared[name]),
            f"seed/{name}": float(context.seed),
        }
    return figures


def wanted(config: EvalConfig) -> list[Wanted]:
    """Classes in the training shards; anything in the others."""
    assert config.train is not None
    return [
        class_wanted(config, config.train),
        *(
            Wanted(spec, "anything", lambda record: True)
            for spec in (config.data, *config.outside.values())
        ),
    ]


def _training(config: EvalConfig, encode: Encode, context: EvalContext) -> Inside:
    comm, spec = context.comm, config.train
    assert spec is not None
    share = embed_images(spec, encode, context, limit=config.limit)
    pictures = _pictures(share, comm)
    share = with_class(share, config.target, spec=spec, comm=comm)
    names = class_names(share, config.target, comm)
    ids = torch.tensor([r.sample_id for r in share.records], dtype=torch.int64, device=comm.device)
    labels = class_ids(share, config.target, names)
    return Inside(share.features, labels, ids, names, pictures)


def _pictures(share: Share, comm: Comm) -> set[str]:
    """Digests of what all ranks' samples show."""
    own = sorted({record.picture for record in share.records})
    return set(chain.from_iterable(comm.gather_json(own)))


def _outside(
    share: Share, known: set[str], spec: str, comm: Comm
) -> tuple[Float[Tensor, "n dim"], int]:
    """This rank's features of pictures that are not known, and how many are left out of all."""
    new = [i for i, record in enumerate(share.records) if record.picture not in known]
    left = sum(comm.gather_json(len(new)))
    shared = sum(comm.gather_json(len(share.records))) - left
    if not left:
        raise DataError(
            f"all {shared} pictures of {spec} are among those inside too, so none is outside; name "
            "other shards"
        )
    return share.features[
        torch.tensor(new, dtype=torch.int64, device=share.features.device)
    ], shared


def _score(
    kind: str, inside: Inside, config: EvalConfig, encode: Encode, context: EvalContext
) -> Score:
    comm = context.comm
    if kind in ("msp", "energy"):
        logits = _logits(inside, config, encode, context)
        return lambda rows: of_logits(kind, logits(rows))
    if kind == "knn":
        return lambda rows: nearest_score(rows, inside.features, comm)
    if kind == "prototype":
        return lambda rows: prototype_score(rows, inside, comm)
    labels = inside.labels if kind == "mahalanobis" else None
    fit = fit_gaussian(inside.features, labels, num_classes=len(inside.names), comm=comm)
    return fit.score


def of_logits(kind: str, logits: Float[Tensor, "n classes"]) -> Float64[Tensor, " n"]:
    """`msp`: the largest probability. `energy`: log of the summed exponentials."""
    wide = logits.double()
    return wide.logsumexp(dim=1) if kind == "energy" else wide.softmax(dim=1).amax(dim=1)


def nearest_score(
    rows: Float[Tensor, "n dim"], bank: Float[Tensor, "m dim"], comm: Comm
) -> Float64[Tensor, " n"]:
    """The cosine to the k-th nearest of all ranks' training samples."""
    count = int(comm.sum(torch.tensor(bank.shape[0], device=bank.device)))
    queries, unit = F.normalize(rows, dim=1), F.normalize(bank, dim=1)
    found = nearest(queries, unit, k=min(NEIGHBOUR, count), comm=comm)
    return found.scores[:, -1].double()


def prototype_score(
    rows: Float[Tensor, "n dim"], inside: Inside, comm: Comm
) -> Float64[Tensor, " n"]:
    """The cosine to the nearest class, a class being the mean of its unit features."""
    unit = F.normalize(inside.features.double(), dim=1)
    sums = unit.new_zeros(len(inside.names), unit.shape[1]).index_add(0, inside.labels, unit)
    classes = F.normalize(comm.sum(sums), dim=1)
    return (F.normalize(rows.double(), dim=1) @ classes.T).amax(dim=1)


def _logits(
    inside: Inside, config: EvalConfig, encode: Encode, context: EvalContext
) -> Callable[[Tensor], Tensor]:
    """Of the class prompts, or of logistic regression on the training shards."""
    if config.logits == "zero_shot":
        vectors = embed_texts(prompts(inside.names, config.templates), encode, context)
        classes = classifier(vectors.view(len(inside.names), len(config.templates), -1))
        return lambda rows: ZERO_SHOT_SCALE * F.normalize(rows, dim=1) @ classes.T
    comm = context.comm
    unit = F.normalize(inside.features.double(), dim=1)
    count = comm.sum(torch.tensor(float(len(unit)), device=unit.device))
    mean = comm.sum(unit.sum(dim=0)) / count
    spread = (comm.sum((unit - mean).square().sum()) / count).sqrt().clamp(min=1e-6)
    train = (unit - mean) / spread
    none, number = train[:0], len(inside.names)
    splits = Splits(
        *(train, inside.labels, inside.ids, none, inside.labels[:0, None]), number, number
    )
    choice = choose_penalty(splits, seed=context.seed, comm=comm, check=context.check)
    fit = fitted(
        *(train, inside.labels),
        num_classes=number,
        penalty=choice.penalty,
        comm=comm,
        initial=choice.weights,
        check=context.check,
    )
    return lambda rows: (
        with_ones((F.normalize(rows.double(), dim=1) - mean) / spread) @ fit.weights.T
    )
