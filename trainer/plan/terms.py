"""What a recipe's losses cost beside the towers, per rank and step.

The losses themselves are run on tensors without numbers, in a group whose others are not there:
products, the most bytes alive and what is sent are counted, not derived. What is drawn or clustered
(teachers, k-means) follows from sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.kernels.tiled import fixed_reference
from trainer.kernels.way import Way
from trainer.losses.constant_prototypes import PrototypeTable, prototype_cross_entropy
from trainer.losses.contrastive import info_nce
from trainer.losses.learned_prototypes import ActiveRows, LogitOptions, prototype_statistics
from trainer.losses.multi_positive import multi_positive_nce, multi_positive_sigmoid
from trainer.losses.multilabel import MultilabelOptions, multilabel_loss
from trainer.losses.sigmoid import sigmoid_loss
from trainer.plan.watching import Alive, Sent

_TILE = (8192, 8192)
"""Logits at a time while products are counted; a device's kernels keep fewer."""


class Term(NamedTuple):
    """One loss, or something else that a step does beside the towers."""

    name: str
    flops: float
    scratch: float
    """Most bytes alive at once beyond its inputs."""
    sent: Mapping[str, float]
    """Bytes of whole tensors by collective."""
    state: float = 0.0
    """Bytes that stay on the rank: rows and their moments, a teacher's weights."""


class Sizes(NamedTuple):
    """Of a step, as losses see it."""

    per_rank: int
    """Samples of a rank."""
    dim: int
    projected: int | None
    """Width of what prototypes are compared with, where it is another."""
    comm: Comm
    halves: bool
    """Whether features of prototype heads travel as halves."""


def terms_of(config: RunConfig, sizes: Sizes, *, num_tokens: int) -> list[Term]:
    """All of a recipe's, with what is told by its section alone; inside `without_numbers`."""
    recipe: Any = config.recipe
    found = _contrasts(config, sizes)
    for section in (recipe, getattr(recipe, "prototypes", None)):
        if section is not None and hasattr(section, "head") and hasattr(section, "wanted"):
            rows = getattr(section, "num_prototypes", None)
            if rows:
                found.append(_learned("prototypes", section, rows, section.wanted, sizes))
    if recipe.name in ("superclip", "superclass"):
        words = recipe.words()
        length = recipe.model.text_length if words is None else words.length
        found.append(_learned("words", recipe, num_tokens, length, sizes))
    if hasattr(recipe, "episode_samples"):
        found += _translated(recipe, sizes)
    return found


def _contrasts(config: RunConfig, sizes: Sizes) -> list[Term]:
    """The losses between images and texts."""
    recipe: Any = config.recipe
    if recipe.name == "siglip":
        return [measured("sigmoid", sizes, 2, _sigmoid)]
    if recipe.name == "flame":
        texts = recipe.texts_per_visit
        loss = recipe.loss
        return [measured("texts", sizes, 1, lambda *r: _several(loss, texts, *r))]
    if getattr(recipe.model, "text", None) is None:
        return []
    times = recipe.wanted_views().count
    term = measured("contrast", sizes, 2, _info_nce)
    if getattr(recipe, "distill", None) is not None:
        times += 2  # as many products again for the soft targets and the teacher's own
    sent = Counter({name: count * times for name, count in term.sent.items()})
    return [term._replace(flops=term.flops * times, sent=sent)]


def measured(
    name: str,
    sizes: Sizes,
    num_inputs: int,
    loss: Callable[..., Tensor],
    *,
    width: int | None = None,
) -> Term:
    """Run `loss(*rows, scale, comm)` forward and backward; of so many [batch, dim]."""
    dim = width or sizes.dim
    given = [torch.zeros(sizes.per_rank, dim, dtype=torch.float32) for _ in range(num_inputs)]
    leaves = [value.requires_grad_() for value in given]
    scale = torch.ones((), dtype=torch.float32, requires_grad=True)
    alive = Alive()
    alive.leave_out(*leaves, scale)
    with Sent() as sent, FlopCounterMode(display=False) as products, alive:
        loss(*leaves, scale, sizes.comm).backward()
    return Term(name, float(products.get_total_flops()), alive.peak, dict(sent.bytes))


def _info_nce(image: Tensor, text: Tensor, scale: Tensor, comm: Comm) -> Tensor:
    return info_nce(image, text, scale, comm)


def _sigmoid(image: Tensor, text: Tensor, scale: Tensor, comm: Comm) -> Tensor:
    return sigmoid_loss(image, text, scale, scale * 0, comm)


def _several(kind: str, count: int, image: Tensor, scale: Tensor, comm: Comm) -> Tensor:
    texts = torch.zeros(len(image), count, image.shape[1], dtype=torch.float32)
    if kind == "mp_nce":
        return multi_positive_nce(image, texts, scale, comm)
    return multi_positive_sigmoid(image, texts, scale, scale * 0, comm)


def _learned(name: str, section: Any, rows: int, labels: int, sizes: Sizes) -> Term:
    """A table of learnable rows: those of a step are a rank's negatives, and the positives of
    everybody that it owns."""
    head, comm = section.head, sizes.comm
    dim = getattr(section, "features_kept", None) or sizes.projected or sizes.dim
    owned = -(-rows // comm.world_size)
    negatives = min(owned, round(owned * head.sample_rate))
    everyone = sizes.per_rank * comm.world_size
    touched = min(owned, negatives + min(owned, everyone * labels // comm.world_size))
    leaf = torch.zeros(touched, dim, dtype=torch.float32, requires_grad=True)
    ids = torch.zeros(touched, dtype=torch.int64)
    targets = torch.zeros(sizes.per_rank, labels, dtype=torch.int64)
    columns = labels if getattr(section, "negatives", "shared") == "each" else 1

    def loss(features: Tensor, scale: Tensor, comm: Comm) -> Tensor:
        active = ActiveRows(leaf, ids, negatives)
        logits = LogitOptions(
            scale=section.scale,
            gather_dtype=torch.float16 if sizes.halves else None,
            way=Way(tile=_TILE),
        )
        statistics = prototype_statistics(features, targets, active, comm, logits)
        return multilabel_loss(statistics, MultilabelOptions(logits=logits)).loss

    term = measured(name, sizes, 1, loss, width=dim)
    width = sizes.projected or sizes.dim
    state = 4.0 * owned * width * (3 if head.optimizer == "adamw" else 2)
    if head.rows == "bfloat16":
        state = 5.0 * owned * width
    sent = {collective: count * columns for collective, count in term.sent.items()}
    kept = _kept(section, everyone, negatives) if sizes.halves else 0.0
    return Term(
        *(name, term.flops * columns, term.scratch + kept + 4.0 * touched * dim, sent),
        state=0.0 if head.offload else state,
    )


def _kept(section: Any, queries: int, rows: int) -> float:
    """Bytes of exponentials that a GPU's kernel leaves for the backward pass."""
    found = 2.0 * queries * rows
    bounded = fixed_reference(section.scale) is not None
    most = getattr(section, "kept_gib", Way().kept_gib) * 2**30
    return found if bounded and found <= most else 0.0


def _translated(recipe: Any, sizes: Sizes) -> list[Term]:
    """ProtoCLIP's terms: each modality against a table of constants, and against each teacher's."""
    comm = sizes.comm
    dim = sizes.projected or sizes.dim
    tables = [("clusters", recipe.clusters)]
    tables += [(f"teacher {each.name}", each.clusters) for each in recipe.teachers]
    found = []
    for name, clusters in tables:
        local = -(-clusters // comm.world_size)
        rows = torch.zeros(local, dim, dtype=torch.float32)
        table = PrototypeTable(rows, rows, torch.ones(local, dtype=torch.bool), clusters)
        labels = torch.zeros(sizes.per_rank, dtype=torch.int64)

        def loss(image: Tensor, text: Tensor, scale: Tensor, comm: Comm) -> Tensor:
            return sum(  # type: ignore[return-value]
                prototype_cross_entropy(each, labels, table, scale, comm)  # noqa: B023
                for each in (image, text)
            )

        term = measured(name, sizes, 2, loss, width=dim)
        found.append(term._replace(state=4.0 * 2 * 2 * local * dim))
    return found


class Episode(NamedTuple):
    """What happens between two stretches of training, per rank."""

    samples: int
    """Over all ranks."""
    times: int
    """Episodes of the run that have one."""
    clustering_flops: float
    """Of k-means in both modalities; passes of the towers come on top."""


def episodes_of(config: RunConfig, sizes: Sizes) -> Episode | None:
    """None where a recipe trains in one stretch."""
    recipe: Any = config.recipe
    if not hasattr(recipe, "episode_samples"):
        return None
    batch = config.global_batch
    samples = -(-recipe.episode_samples // batch) * batch
    whole = -(-config.steps * batch // samples)
    count = max(0, whole - recipe.warmup_episodes - recipe.locked_tail_episodes)
    dim = sizes.projected or sizes.dim
    passes = (recipe.kmeans_iterations + 1) * recipe.kmeans_restarts
    products = 2.0 * samples * recipe.clusters * dim * passes * 2
    return Episode(samples, count, products / sizes.comm.world_size)
