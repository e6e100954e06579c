"""What every rank computes for the tests of this folder: one launch per world size.

Each case returns what this rank holds: its value, and the gradients of its own leaves after all
ranks ran backward together. Those are gradients of the SUM of the ranks' losses; the objective
is their mean, and the engine's average over ranks makes up the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from tests.losses.dense import problem, random_rows
from tests.ranks import run_ranks
from tests.recipes.golden_cases import PRECISIONS, recipe_case
from tests.recipes.prototype_cases import prototype_case as head_case
from trainer.cluster import translate
from trainer.cluster.translate import group_means
from trainer.comm import Comm
from trainer.errors import DataError
from trainer.losses.constant_prototypes import (
    PrototypeTable,
    prototype_cross_entropy,
    prototype_table,
    target_figures,
)
from trainer.losses.contrastive import info_nce
from trainer.losses.distill import soft_distillation
from trainer.losses.sigmoid import sigmoid_loss

Arrays = Mapping[str, np.ndarray]
GOLDEN = Path(__file__).parent.parent / "golden"
RECIPE_FILES = (
    *("open_clip/*.npz", "protoclip/step_*.npz", "flame/mp_*.npz"),
    *("aclip/loss_*.npz", "aclip/simclr_*.npz"),
    "tinyclip/affinity_*.npz",
)
HEAD_FILES = ("partial_fc/*.npz", "mlcd/*.npz")
HEAD_SIZES = (1, 2, 4)
"""Ranks that share the eight rows of files that are of no number of ranks."""
DIVERGENT = "rankdivergent"
"""In the name of the file that shows a defect: each rank compares other coordinates."""
NUM_PROTOTYPES = (3, 7, 10)
"""On four ranks: 3 leaves one of them without rows, 7 and 10 split unevenly."""
TEMPERATURES = (-1.0, 0.05)
GLOBAL_BATCH = 12
TRANSLATE_GROUPS = 6


def golden(path: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / path, allow_pickle=False) as arrays:
        return dict(arrays)


def golden_names(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.glob(pattern))


def world_size_of(path: str) -> int:
    size = told_world_size(path)
    assert size is not None
    return size


@cache
def told_world_size(path: str) -> int | None:
    """The number of ranks that a file is of, where it is of one. Nothing else of it is read."""
    with np.load(GOLDEN / path, allow_pickle=False) as arrays:
        return int(arrays["world_size"]) if "world_size" in arrays else None


def results(world_size: int) -> list[Mapping[str, Arrays]]:
    """The cases of every rank of a group of this size, in rank order, by name.

    A case is computed when it is asked for, together with those of its family: a launch for each.
    """
    return [CasesOfRank(world_size, rank) for rank in range(world_size)]


class CasesOfRank(Mapping[str, Arrays]):
    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.rank = world_size, rank

    def __getitem__(self, name: str) -> Arrays:
        return computed(self.world_size, family_of(name))[self.rank][name]

    def __iter__(self) -> Iterator[str]:
        raise TypeError("cases are asked for by name")

    def __len__(self) -> int:
        raise TypeError("cases are asked for by name")


@cache
def computed(world_size: int, family: str) -> list[dict[str, Arrays]]:
    if world_size == 1:
        return [every_case(Comm.solo(), family)]
    return run_ranks(every_case, world_size, family, timeout_seconds=300)


def every_case(comm: Comm, family: str) -> dict[str, Arrays]:
    """Of one family; nothing of the others is read."""
    return {name: case() for name, case in cases_of(comm) if family_of(name) == family}


def family_of(name: str) -> str:
    """Golden files by folder and the first word of their name, in float64 and as recipes apart;
    the others each by themselves."""
    path, _, precision = name.partition(" ")
    folder, _, file = path.partition("/")
    family = f"{folder}/{file.partition('_')[0]}" if file else name
    return f"{family} in precisions" if precision in PRECISIONS else family


def cases_of(comm: Comm) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Names of the cases of a group of this size, and what computes them."""
    for pattern, case in GOLDEN_LOSSES.items():
        for name in golden_names(pattern):
            if world_size_of(name) == comm.world_size:
                yield name, partial(published_case, comm, case, name)
    for name in (name for pattern in RECIPE_FILES for name in golden_names(pattern)):
        if world_size_of(name) == comm.world_size:
            for precision in PRECISIONS:
                yield f"{name} {precision}", partial(whole_recipe, comm, name, precision)
    for name in head_files(comm.world_size):
        for precision in PRECISIONS:
            yield f"{name} {precision}", partial(whole_head, comm, name, precision)
    for number in NUM_PROTOTYPES:
        for temperature in TEMPERATURES:
            case = partial(prototype_case, comm, num_prototypes=number, temperature=temperature)
            yield f"prototypes {number} {temperature}", case
    yield "pairs", partial(pairs_case, comm)
    yield "nothing known", partial(nothing_known_case, comm)
    yield "translate", partial(translate_case, comm)


def published_case(comm: Comm, case: Callable[[Comm, Arrays], Arrays], name: str) -> Arrays:
    return case(comm, golden(name))


def whole_recipe(comm: Comm, name: str, precision: str) -> Arrays:
    arrays = golden(name)
    return recipe_case(name, arrays, gathering(comm, arrays), precision)


def whole_head(comm: Comm, name: str, precision: str) -> Arrays:
    with TemporaryDirectory() as folder:
        return head_case(name, golden(name), comm, PRECISIONS[precision], Path(folder))


def head_files(world_size: int) -> list[str]:
    """Files with rows of a head that this many ranks compute."""
    names = [name for pattern in HEAD_FILES for name in golden_names(pattern)]
    fits = {name: told_world_size(name) for name in names if DIVERGENT not in name}
    return [
        name
        for name, size in fits.items()
        if (world_size in HEAD_SIZES if size is None else size == world_size)
    ]


def affinity_case(comm: Comm, arrays: Arrays) -> Arrays:
    """TinyCLIP's two directions and their half sum, each with its own backward pass."""
    teacher = [
        torch.from_numpy(arrays[f"teacher_{side}_features"][comm.rank])
        for side in ("image", "text")
    ]
    found: dict[str, np.ndarray] = {}
    for which in ("img2text", "text2img", "mean2"):
        image, text, scale = own_leaves(
            comm, arrays, "image_features", "text_features", "logit_scale"
        )
        said = soft_distillation(
            image, text, scale, *teacher, float(arrays["teacher_logit_scale"]), comm
        )
        terms = {"img2text": said.image_to_text, "text2img": said.text_to_image, "mean2": said.loss}
        leaves = {"grad_image": image, "grad_text": text, "grad_logit_scale": scale}
        values = after_backward(terms[which], **leaves)
        found |= {f"{name}_{which}": value for name, value in values.items()}
    divergence = said.divergence.detach().numpy()
    return {**found, "divergence": divergence, "entropy": said.teacher_entropy.numpy()}


class KeysAreConstants(Comm):
    """What others send carries no gradient back, nor does what one sends oneself."""

    def all_gather(self, rows: Tensor) -> Tensor:
        return super().all_gather(rows.detach())


def gathering(comm: Comm, arrays: Arrays) -> Comm:
    """As the original gathers: its own rows alone may carry gradient."""
    if arrays.get("local_loss") and not arrays["gather_with_grad"]:
        return KeysAreConstants(comm.rank, comm.world_size, comm.device, comm.group)
    return comm


def contrastive_case(comm: Comm, arrays: Arrays) -> Arrays:
    image, text, scale = own_leaves(comm, arrays, "image_features", "text_features", "logit_scale")
    loss = info_nce(image, text, scale, gathering(comm, arrays))
    return after_backward(loss, grad_image=image, grad_text=text, grad_logit_scale=scale)


def sigmoid_case(comm: Comm, arrays: Arrays) -> Arrays:
    image, text, scale, bias = own_leaves(
        comm, arrays, "image_features", "text_features", "logit_scale", "logit_bias"
    )
    loss = sigmoid_loss(image, text, scale, bias, comm)
    return after_backward(
        loss, grad_image=image, grad_text=text, grad_logit_scale=scale, grad_logit_bias=bias
    )


def step_case(comm: Comm, arrays: Arrays) -> Arrays:
    """A whole ProtoCLIP loss: translate the episode's groups, make the tables, add the terms."""
    image, text, image_rows, text_rows, scale, prototype_scale = own_leaves(
        comm,
        arrays,
        *("image_features", "text_features", "image_proj", "text_proj"),
        *("logit_scale", "logit_scale_proto"),
    )
    positions = torch.from_numpy(arrays["batch_index"][comm.rank])
    heads = {"image": image_rows, "text": text_rows}
    terms = {"clip": info_nce(image, text, scale, comm)}
    tables = {}
    for student, grouping in (
        *(("image", "text"), ("text", "image")),
        *(("image", "external"), ("text", "external")),
    ):
        table = episode_table(comm, arrays, student=student, grouping=grouping)
        labels = torch.from_numpy(arrays[f"episode_labels_{grouping}"])[positions]
        kind = "external" if grouping == "external" else "proto"
        terms[f"{kind}_{student}"] = prototype_cross_entropy(
            heads[student], labels, table, prototype_scale, comm
        )
        tables[f"table_{student}_from_{grouping}"] = table.prototypes.numpy()
    for kind in ("proto", "external"):
        terms[kind] = (terms[f"{kind}_image"] + terms[f"{kind}_text"]) / 2
    total = terms["clip"] + terms["proto"] + terms["external"]
    values = {f"loss_{name}": value.detach().numpy() for name, value in terms.items()}
    gradients = after_backward(
        total,
        grad_image_features=image,
        grad_text_features=text,
        grad_image_proj=image_rows,
        grad_text_proj=text_rows,
        grad_logit_scale=scale,
        grad_logit_scale_proto=prototype_scale,
    )
    return {**values, **tables, **gradients, "loss_total": gradients["loss"]}


def episode_table(comm: Comm, arrays: Arrays, *, student: str, grouping: str) -> PrototypeTable:
    """Each rank holds a slice of the episode. As in the original, empty groups stay as rows of
    logit zero, and external targets are hard."""
    mine = slice(comm.rank, None, comm.world_size)
    centroids = torch.from_numpy(arrays[f"centroids_{grouping}"])
    means = group_means(
        torch.from_numpy(arrays[f"episode_{student}_proj"][mine]),
        torch.from_numpy(arrays[f"episode_labels_{grouping}"][mine]),
        num_groups=len(centroids),
        comm=comm,
    )
    return prototype_table(
        means.rows,
        centroids[slice(*comm.row_range(len(centroids)))],
        valid=torch.ones(len(means.rows), dtype=torch.bool),
        num_prototypes=len(centroids),
        temperature=-1.0 if grouping == "external" else float(arrays["target_temperature"]),
        comm=comm,
    )


def global_problem(num_prototypes: int, temperature: float):
    return problem(
        batch=GLOBAL_BATCH,
        num_prototypes=num_prototypes,
        temperature=temperature,
        num_empty=1,
        num_unknown=4,
    )


def prototype_case(comm: Comm, *, num_prototypes: int, temperature: float) -> Arrays:
    """A fixed global batch with unknown labels, an empty prototype, uneven and empty shards."""
    whole = global_problem(num_prototypes, temperature)
    rows = slice(*comm.row_range(num_prototypes))
    table = prototype_table(
        whole.prototypes[rows],
        whole.teacher[rows],
        valid=whole.valid[rows],
        num_prototypes=num_prototypes,
        temperature=temperature,
        comm=comm,
    )
    figures = target_figures(
        whole.teacher[rows],
        counts=torch.arange(num_prototypes)[rows],
        valid=whole.valid[rows],
        num_prototypes=num_prototypes,
        temperature=temperature,
        comm=comm,
    )
    features, scale = leaf(own_share(comm, whole.features)), leaf(whole.scale)
    loss = prototype_cross_entropy(features, own_share(comm, whole.labels), table, scale, comm)
    return {
        **after_backward(loss, grad_features=features, grad_scale=scale),
        "figures": torch.stack(figures).numpy(),
        "targets": table.targets.numpy(),
    }


def nothing_known_case(comm: Comm) -> Arrays:
    whole = problem(batch=GLOBAL_BATCH, num_prototypes=5, num_unknown=GLOBAL_BATCH)
    rows = slice(*comm.row_range(5))
    table = PrototypeTable(
        whole.prototypes[rows], whole.prototypes[rows], whole.valid[rows], num_prototypes=5
    )
    features, scale = leaf(own_share(comm, whole.features)), leaf(whole.scale)
    loss = prototype_cross_entropy(features, own_share(comm, whole.labels), table, scale, comm)
    return after_backward(loss, grad_features=features, grad_scale=scale)


def global_pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    image, text = (random_rows(GLOBAL_BATCH, 5, draw) for _ in range(2))
    return image, text, torch.tensor(12.0).double(), torch.tensor(-4.0).double()


def pairs_case(comm: Comm) -> Arrays:
    """InfoNCE plus the sigmoid loss of a fixed global batch."""
    whole_image, whole_text, whole_scale, whole_bias = global_pairs()
    image, text = (leaf(own_share(comm, rows)) for rows in (whole_image, whole_text))
    scale, bias = leaf(whole_scale), leaf(whole_bias)
    loss = info_nce(image, text, scale, comm) + sigmoid_loss(image, text, scale, bias, comm)
    return after_backward(loss, grad_image=image, grad_text=text, grad_scale=scale, grad_bias=bias)


def translate_problem() -> tuple[Tensor, Tensor]:
    """Unit features of 40 samples, groups 0 to 4 of 6 and some samples in none."""
    draw = torch.Generator().manual_seed(2)
    return random_rows(40, 3, draw), torch.randint(-1, 5, (40,), generator=draw)


def translate_case(comm: Comm) -> Arrays:
    """Samples unevenly over the ranks: the last of several has none."""
    features, labels = translate_problem()
    owner = torch.arange(40) ** 2 // 7 % max(1, comm.world_size - 1)
    mine = features[owner == comm.rank], labels[owner == comm.rank]
    means = group_means(*mine, num_groups=TRANSLATE_GROUPS, comm=comm)
    with patch.object(translate, "BLOCK_ELEMENTS", 9):
        blocks = group_means(*mine, num_groups=TRANSLATE_GROUPS, comm=comm)
    single = group_means(mine[0].float(), mine[1], num_groups=TRANSLATE_GROUPS, comm=comm)
    return {
        "rows": means.rows.numpy(),
        "counts": means.counts.numpy(),
        "rows_in_blocks": blocks.rows.numpy(),
        "rows_in_float32": single.rows.numpy(),
        "refused": np.array(refuses_a_wrong_label_of_rank_zero(comm)),
    }


def refuses_a_wrong_label_of_rank_zero(comm: Comm) -> bool:
    """Every rank has to, or those that don't would wait for the one that left."""
    labels = torch.tensor([0, TRANSLATE_GROUPS if comm.rank == 0 else 1])
    try:
        group_means(torch.zeros(2, 3), labels, num_groups=TRANSLATE_GROUPS, comm=comm)
    except DataError:
        return True
    return False


def own_share(comm: Comm, rows: Tensor) -> Tensor:
    return rows.chunk(comm.world_size)[comm.rank]


def leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def own_leaves(comm: Comm, arrays: Arrays, *names: str) -> list[Tensor]:
    """This rank's block of each array that has a leading axis of ranks; scalars as they are."""
    values = (torch.from_numpy(np.asarray(arrays[name])) for name in names)
    return [leaf(value[comm.rank] if value.ndim else value) for value in values]


def after_backward(loss: Tensor, **leaves: Tensor) -> Arrays:
    loss.backward()
    assert all(value.grad is not None for value in leaves.values())
    return {
        "loss": loss.detach().numpy(),
        **{name: value.grad.numpy() for name, value in leaves.items()},
    }


GOLDEN_LOSSES: dict[str, Callable[[Comm, Arrays], Arrays]] = {
    "open_clip/clip_infonce_*.npz": contrastive_case,
    "open_clip/siglip_*.npz": sigmoid_case,
    "protoclip/step_*.npz": step_case,
    "tinyclip/affinity_*.npz": affinity_case,
}
