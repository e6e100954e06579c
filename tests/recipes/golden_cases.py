"""The recipes themselves on the published arrays: `Recipe.losses` of features that are the arrays.

Each case is run in float64 and in float32, and returns what this rank holds: its total, and the
gradients of its own leaves after all ranks ran backward together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.cluster.stores import identity
from trainer.cluster.problem import KMeansResult
from trainer.comm import Comm
from trainer.config import DataConfig
from trainer.data.labels import ClusterLabels
from trainer.data.tokenize import train_tokenizer
from trainer.parts.episodes import Extracted
from trainer.parts.teacher import TeacherConfig, TeacherGroups
from trainer.recipe import Context, load_recipe
from trainer.settings.recipe_files import recipe_config
from trainer.store import StoreWriter
from trainer.types import Batch, Features

Arrays = Mapping[str, np.ndarray]
TOWERS = {
    "image_size": 16,
    "patch_size": 8,
    "text_length": 8,
    "embed_dim": 8,
    "image": {"width": 16, "layers": 1, "heads": 2},
    "text": {"width": 16, "layers": 1, "heads": 2},
}
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
SPREAD = 7919
"""Between the sample ids of the episode's positions."""


def recipe_case(name: str, arrays: Arrays, comm: Comm, precision: str) -> dict[str, np.ndarray]:
    """One file (`open_clip/clip_infonce_w1.npz`, say) through the recipe that it is of."""
    dtype = PRECISIONS[precision]
    values = {
        key: torch.from_numpy(np.asarray(value)).to(dtype)
        if value.dtype == np.float64
        else torch.from_numpy(np.asarray(value))
        for key, value in arrays.items()
    }
    kind = name.rpartition("/")[2]
    case = next(case for start, case in CASES.items() if kind.startswith(start))
    with tempfile.TemporaryDirectory() as folder:
        return case(values, comm, Path(folder))


def recipe(settings: dict[str, Any], comm: Comm, folder: Path) -> Any:
    tokenizer = train_tokenizer(["a text"], vocab_size=259, length=8)
    data = DataConfig(train="none.tar")
    context = Context(comm, tokenizer, 0, global_batch=8, steps=1, workdir=folder, data=data)
    return load_recipe(recipe_config(settings), context)


def measured(
    recipe: Any, features: Mapping[str, Tensor], batch: Batch, **grads: str
) -> dict[str, np.ndarray]:
    """`grads`: a name for the gradient of each feature."""
    leaves = {name: value.clone().requires_grad_() for name, value in features.items()}
    losses = recipe.losses(Features(**leaves), batch, 0)
    losses.total.backward()
    return {
        "loss": losses.total.detach().numpy(),
        **{f"term {name}": losses[name].detach().numpy() for name in losses},
        **{theirs: leaves[ours].grad.numpy() for ours, theirs in grads.items()},
    }


PAIR = {"image": "grad_image", "text": "grad_text", "logit_scale": "grad_logit_scale"}


def pair(values: Mapping[str, Tensor], comm: Comm) -> dict[str, Tensor]:
    return {
        "image": values["image_features"][comm.rank],
        "text": values["text_features"][comm.rank],
        "logit_scale": values["logit_scale"],
    }


def batch_of(ids: Tensor, texts: Tensor | None = None) -> Batch:
    return Batch(None, None, None, ids, texts=texts)


def clip_case(values: Mapping[str, Tensor], comm: Comm, folder: Path) -> dict[str, np.ndarray]:
    built = recipe({"name": "clip", "model": TOWERS}, comm, folder)
    features = pair(values, comm)
    return measured(built, features, batch_of(torch.arange(len(features["image"]))), **PAIR)


def siglip_case(values: Mapping[str, Tensor], comm: Comm, folder: Path) -> dict[str, np.ndarray]:
    built = recipe({"name": "siglip", "model": TOWERS}, comm, folder)
    features = {**pair(values, comm), "logit_bias": values["logit_bias"]}
    ids = torch.arange(len(features["image"]))
    return measured(built, features, batch_of(ids), **PAIR, logit_bias="grad_logit_bias")


def distill_case(values: Mapping[str, Tensor], comm: Comm, folder: Path) -> dict[str, np.ndarray]:
    """Clip with a teacher; what the workers would have read is the teacher's arrays."""
    teacher = torch.stack(
        [values[f"teacher_{side}_features"][comm.rank] for side in ("image", "text")], dim=1
    )
    for side, reads in (("image", "image"), ("text", "txt")):
        write_one(folder / side, reads, dim=teacher.shape[2])
    settings = {
        "image_store": folder / "image",
        "text_store": folder / "text",
        "logit_scale": float(values["teacher_logit_scale"]),
    }
    built = recipe({"name": "clip", "model": TOWERS, "distill": settings}, comm, folder)
    features = pair(values, comm)
    batch = batch_of(torch.arange(len(teacher)), teacher)
    found = measured(built, features, batch, **PAIR)
    alone = measured(
        recipe({"name": "clip", "model": TOWERS}, comm, folder), features, batch, **PAIR
    )
    # The arrays hold the gradient of the distillation alone.
    return {**found, **{name: found[name] - alone[name] for name in PAIR.values()}}


def affinity_case(values: Mapping[str, Tensor], comm: Comm, folder: Path) -> dict[str, np.ndarray]:
    """TinyCLIP: the teacher's similarities alone, without the pairs themselves."""
    teacher = torch.stack(
        [values[f"teacher_{side}_features"][comm.rank] for side in ("image", "text")], dim=1
    )
    for side, reads in (("image", "image"), ("text", "txt")):
        write_one(folder / side, reads, dim=teacher.shape[2])
    settings = {
        "image_store": folder / "image",
        "text_store": folder / "text",
        "logit_scale": float(values["teacher_logit_scale"]),
    }
    clip = {"name": "clip", "model": TOWERS, "weight": 0.0, "distill": settings}
    batch = batch_of(torch.arange(len(teacher)), teacher)
    grads = {name: f"{theirs}_mean2" for name, theirs in PAIR.items()}
    return measured(recipe(clip, comm, folder), pair(values, comm), batch, **grads)


def flame_case(values: Mapping[str, Tensor], comm: Comm, folder: Path) -> dict[str, np.ndarray]:
    image = values["image_features"][comm.rank]
    positives = int(values["texts_per_image"])
    write_one(folder / "store", "txt", dim=image.shape[1], vectors=positives)
    sigmoid = "logit_bias" in values
    model = {k: TOWERS[k] for k in ("image_size", "patch_size", "image")}
    settings = {
        "name": "flame",
        "store": folder / "store",
        "texts_per_visit": positives,
        "head_hidden": 8,
        "loss": "mp_sigmoid" if sigmoid else "mp_nce",
        "model": {**model, "embed_dim": image.shape[1]},
    }
    texts = values["text_features"][comm.rank].unflatten(0, (len(image), positives))
    features = {"image": image, "logit_scale": values["logit_scale"]}
    grads = {"image": "grad_image", "logit_scale": "grad_logit_scale"}
    if sigmoid:
        features["logit_bias"] = values["logit_bias"]
        grads["logit_bias"] = "grad_logit_bias"
    batch = batch_of(torch.arange(len(image)), texts)
    return measured(recipe(settings, comm, folder), features, batch, **grads)


def protoclip_case(values: Mapping[str, Tensor], comm: Comm, folder: Path) -> dict[str, np.ndarray]:
    """The recipe fills an episode from this rank's slice of it, then scores the batch."""
    clusters = len(values["centroids_image"])
    settings = {
        "name": "protoclip",
        "model": TOWERS,
        "clusters": clusters,
        "episode_samples": len(values["episode_image_proj"]),
        "target_temperature": float(values["target_temperature"]),
        "reference_zero_rows": True,
    }
    built = recipe(settings, comm, folder)
    everyone = torch.arange(len(values["episode_image_proj"])) * SPREAD
    built.teachers = {"external": external_groups(values, everyone, comm)}
    mine = slice(comm.rank, None, comm.world_size)
    sides = ("image", "text")
    extracted = Extracted(everyone[mine], *(values[f"episode_{side}_proj"][mine] for side in sides))
    clustered = {
        side: KMeansResult(
            values[f"centroids_{side}"],
            values[f"episode_labels_{side}"][mine],
            torch.bincount(values[f"episode_labels_{side}"], minlength=clusters),
            objective=[],
            repaired=0,
            inertia=0.0,
        )
        for side in sides
    }
    built._fill(extracted, clustered)
    features = {
        **pair(values, comm),
        "image_projected": values["image_proj"][comm.rank],
        "text_projected": values["text_proj"][comm.rank],
        "prototype_scale": values["logit_scale_proto"],
    }
    return measured(
        built,
        features,
        batch_of(values["batch_index"][comm.rank] * SPREAD),
        image="grad_image_features",
        text="grad_text_features",
        image_projected="grad_image_proj",
        text_projected="grad_text_proj",
        logit_scale="grad_logit_scale",
        prototype_scale="grad_logit_scale_proto",
    )


def aclip_case(values: Mapping[str, Tensor], comm: Comm, folder: Path) -> dict[str, np.ndarray]:
    """The published code's loss, of rows that are not yet of length one; view 1 before view 2."""
    heads = {"head": {"hidden": 8, "dim": 4}}
    settings = {
        "name": "aclip",
        "model": TOWERS,
        "parity": "code",
        "tokens": {"select": "none"},
        "simclr": heads,
        "byol": heads,
    }
    names = ("image_embed", "text_embed", "image_ssl_embed", "byol_pred")
    leaves = {name: values[name][comm.rank].clone().requires_grad_() for name in names}
    scale = values["logit_scale"].clone().requires_grad_()
    image, found, predicted = (
        torch.stack(normalize(leaves[name], dim=1).chunk(2), dim=1)
        for name in ("image_embed", "image_ssl_embed", "byol_pred")
    )
    features = Features(
        image=image[:, 0],
        text=normalize(leaves["text_embed"], dim=1),
        logit_scale=scale,
        more={"further": image[:, 1:], "simclr": found, "byol": predicted},
    )
    target = normalize(values["byol_target"][comm.rank], dim=1)
    batch = batch_of(torch.arange(len(target)))._replace(more={"byol_target": target})
    return scored(recipe(settings, comm, folder), features, batch, {**leaves, "logit_scale": scale})


def cross_view_case(
    values: Mapping[str, Tensor], comm: Comm, folder: Path
) -> dict[str, np.ndarray]:
    """SimCLR as the paper means it; CLIP beside it is of other rows."""
    settings = {
        "name": "aclip",
        "model": TOWERS,
        "tokens": {"select": "none"},
        "simclr": {"head": {"hidden": 8, "dim": 4}},
        "byol": None,
    }
    leaves = {name: values[name][comm.rank].clone().requires_grad_() for name in ("view1", "view2")}
    found = torch.stack([normalize(view, dim=1) for view in leaves.values()], dim=1)
    spare = torch.ones_like(found[:, 0])
    more = {"further": spare[:, None], "simclr": found}
    features = Features(image=spare, text=spare, logit_scale=torch.ones(()), more=more)
    return scored(
        recipe(settings, comm, folder), features, batch_of(torch.arange(len(spare))), leaves
    )


def scored(
    recipe: Any, features: Features, batch: Batch, leaves: Mapping[str, Tensor]
) -> dict[str, np.ndarray]:
    losses = recipe.losses(features, batch, 0)
    losses.total.backward()
    return {
        "loss": losses.total.detach().numpy(),
        **{f"term {name}": losses[name].detach().numpy() for name in losses},
        **{f"grad_{name}": leaf.grad.numpy() for name, leaf in leaves.items()},
    }


def external_groups(values: Mapping[str, Tensor], ids: Tensor, comm: Comm) -> TeacherGroups:
    centroids = values["centroids_external"]
    return TeacherGroups(
        TeacherConfig(name="external", store=Path("none"), clusters=len(centroids)),
        1.0,
        ClusterLabels(ids, values["episode_labels_external"]),
        centroids[slice(*comm.row_range(len(centroids)))],
    )


def write_one(folder: Path, reads: str, *, dim: int, vectors: int = 1) -> None:
    """A store of one sample: what a recipe checks of a store, and no vector that is used."""
    what = identity(dim, vectors).model_copy(update={"reads": reads, "pooling": "projected"})
    writer = StoreWriter.begin(folder, what, {"one": ("one", 1)})
    writer.announce()
    writer.write("one", np.array([1], dtype=np.int64), torch.ones(1, vectors, dim))
    writer.finish()


CASES = {
    "clip_infonce": clip_case,
    "clip_distill": distill_case,
    "affinity": affinity_case,
    "siglip": siglip_case,
    "mp_": flame_case,
    "step": protoclip_case,
    "loss_w": aclip_case,
    "simclr_crossview": cross_view_case,
}
