"""A small labelled store with views, and what each rank trains on it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.cluster.stores import write_store
from trainer.comm import Comm
from trainer.store import EmbeddingStore
from trainer.tuning.features import LabelledStore
from trainer.tuning.fit import PRESETS, tune
from trainer.tuning.measure import accuracy, spread, tuned_classify, tuned_features

CLASSES, DIM, VIEWS = 3, 8, 3


def made_store(folder: Path, *, count: int = 45, noise: float = 0.2) -> Path:
    """Gaussians around the classes' axes: a clean vector and `VIEWS` others of each sample."""
    draw = torch.Generator().manual_seed(count)
    centres = 2 * torch.eye(CLASSES, DIM)[torch.arange(count) % CLASSES]
    rows = centres[:, None] + noise * torch.randn(count, 1 + VIEWS, DIM, generator=draw) + 1.0
    write_store(folder, rows, torch.arange(count) + 7, sizes=[20, count - 20])
    return folder


def opened(folder: Path) -> LabelledStore:
    store = EmbeddingStore.open(folder)
    ids = torch.from_numpy(store.ids.copy())
    names = tuple(map(str, range(CLASSES)))
    return LabelledStore(store, ids, (ids - 7) % CLASSES, names)


def trained(comm: Comm, folder: Path, method: str) -> dict[str, torch.Tensor]:
    data = opened(folder)
    config = PRESETS[method].model_copy(update={"epochs": 1, "batch": 23})
    model = tune(data, config, seed=1, comm=comm)
    classify = tuned_classify(model, comm)
    found = {name: value.clone() for name, value in model.state_dict().items()}
    features = tuned_features(model, comm)
    found["spread"] = torch.tensor(list(spread(features, data, comm).values()))
    found["logits"] = classify(data.clean(torch.arange(10))).detach()
    found["accuracy"] = torch.tensor(accuracy(classify, data, comm))
    return found


def all_trained(comm: Comm, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: trained(comm, folder, name) for name in ("linear", "repo", "paper")}
