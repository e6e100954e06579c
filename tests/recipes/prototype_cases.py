"""Recipes with a real, sharded head on the published arrays of Partial FC, MLCD and eight slots.

The head holds the arrays' rows and moves them by plain SGD at a rate of one, so that what they
moved is their gradient. Only which rows are drawn is the arrays' word instead of a hash's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from trainer.comm import Comm
from trainer.config import DataConfig
from trainer.data.labels import ClusterLabels
from trainer.parts import prototype_head, prototypes
from trainer.parts.row_optimizer import RowOptimizer
from trainer.recipe import Context, load_recipe
from trainer.settings.recipe_files import recipe_config
from trainer.types import Batch, Features

Arrays = Mapping[str, np.ndarray]
MODEL = {
    "image_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "image": {"width": 16, "layers": 1, "heads": 2},
}
PLAIN = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, "weight_decay": 0.0}
KINDS = ("cosine", "angular", "straight_through")


def settings_of(name: str, arrays: Arrays) -> dict[str, Any]:
    """The recipe that a file is of, with its constants."""
    said: dict[str, Any] = {"scale": float(arrays["scale"])}
    if name.startswith("mlcd/ml"):
        said |= {
            "name": "mlcd",
            "loss": "mlcd" if "row_positive_term" in arrays else "mlc",
            "margin": KINDS[int(arrays["margin_kind"])],
            "margin_size": float(arrays["margin"]),
        }
        return said
    said["ceiling"] = float(arrays["interclass_filter"]) or None
    cosine, angle = float(arrays["margin_m3"]), float(arrays.get("margin_m2", 0.0))
    said |= {
        "margin": "cosine" if cosine > 0 else "straight_through",
        "margin_size": cosine if cosine > 0 else angle,
    }
    if name.startswith("mlcd/ov8"):
        return said | {"name": "mlcd", "loss": "slots", "negatives": "each"}
    if "feature_ids" in arrays:
        return said | {"name": "unicom", "features_kept": arrays["feature_ids"].shape[1]}
    return said | {"name": "partial_fc"}


def prototype_case(
    name: str, arrays: Arrays, comm: Comm, dtype: torch.dtype, folder: Path
) -> dict[str, np.ndarray]:
    """This rank's loss, the gradient of its features, and how its rows moved."""
    features, labels = global_batch(arrays, dtype)
    count = len(features) // comm.world_size
    ids = torch.arange(comm.rank * count, (comm.rank + 1) * count)
    ClusterLabels(torch.arange(len(features)), labels).save(folder / "labels")
    built = recipe(settings_of(name, arrays), arrays, labels.shape[1], comm, folder)
    head = built.term.head
    first, last = head.row_range
    rows = torch.from_numpy(arrays["weight"][first:last]).to(dtype)
    head._optimizer = RowOptimizer(rows.clone(), head.config)
    mine = features[ids].requires_grad_()
    batch = Batch(None, None, None, ids)
    with drawn(arrays, comm):
        losses = built.losses(Features(image=mine), batch, 0)
    losses.total.backward()
    assert mine.grad is not None
    assert head.gradients_finite()
    head.after_step(0, applied=True, learning_rate_factor=1.0)
    return {
        "loss": losses.total.detach().numpy(),
        "grad_features": mine.grad.numpy(),
        "grad_weight": (rows - head.rows).numpy(),
    }


def global_batch(arrays: Arrays, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features and labels of all ranks below each other."""
    features = torch.from_numpy(arrays["features"]).to(dtype)
    labels = torch.from_numpy(arrays["labels_used" if "labels_used" in arrays else "labels"])
    if "world_size" in arrays:
        features, labels = features.flatten(0, 1), labels.flatten(0, 1)
    return features, labels[:, None] if labels.dim() == 1 else labels


def recipe(said: dict[str, Any], arrays: Arrays, per_sample: int, comm: Comm, folder: Path) -> Any:
    settings = {
        **said,
        "model": MODEL,
        "labels": folder / "labels",
        "labels_per_sample": per_sample,
        "num_prototypes": int(arrays["num_classes"]),
        "head": PLAIN,
    }
    data = DataConfig(train="none.tar", reader="webdataset")  # labels of no shards
    context = Context(comm, None, 0, global_batch=8, steps=1, workdir=folder, data=data)
    return load_recipe(recipe_config(settings), context)


@contextmanager
def drawn(arrays: Arrays, comm: Comm) -> Iterator[None]:
    """The rows, and the coordinates, that the published code drew."""

    def sampled(first: int, last: int, *, slot: int | None = None, **_: Any) -> Tensor:
        ids = active_ids(arrays, slot)
        return torch.isin(torch.arange(first, last), ids)

    def kept(dim: int, count: int, key: int) -> Tensor:
        return torch.from_numpy(arrays["feature_ids"][comm.rank]).long()

    with (
        patch.object(prototype_head, "sampled_rows", sampled),
        patch.object(prototypes, "coordinate_subset", kept),
    ):
        yield


def active_ids(arrays: Arrays, slot: int | None = None) -> Tensor:
    """Of all ranks, ascending."""
    if "active_class_mask" in arrays:
        return torch.from_numpy(arrays["active_class_mask"]).nonzero()[:, 0]
    if "sampled_class_ids" not in arrays:
        return torch.arange(int(arrays["num_classes"]))
    ids = arrays["sampled_class_ids"]
    ids = torch.from_numpy(ids if slot is None else ids[:, slot]).flatten()
    return ids[ids >= 0].unique()


def rows_of_cross_entropy(arrays: Arrays) -> np.ndarray:
    """Of a file of Partial FC or UNICOM: each row's loss from the whole matrix, without a floor."""
    features, labels = global_batch(arrays, torch.float64)
    table = torch.from_numpy(arrays["weight"]).double()
    if "feature_ids" in arrays:
        kept = torch.from_numpy(arrays["feature_ids"][0]).long()
        features, table = features[:, kept], table[:, kept]
    unit = torch.nn.functional.normalize
    cosines = unit(features, dim=1) @ unit(table, dim=1).T
    own = cosines.gather(1, labels)
    if float(arrays["margin_m3"]) > 0:
        target = own - float(arrays["margin_m3"])
    else:
        target = (own.arccos() + float(arrays["margin_m2"])).cos()
    if ceiling := float(arrays["interclass_filter"]):
        cosines = cosines.masked_fill(cosines > ceiling, 0.0)
    scale = float(arrays["scale"])
    logits = (scale * cosines).scatter(1, labels, scale * target)
    inactive = torch.ones(len(table), dtype=torch.bool)
    inactive[active_ids(arrays)] = False
    logits = logits.masked_fill(inactive, -torch.inf)
    return (logits.logsumexp(1) - logits.gather(1, labels)[:, 0]).numpy()
