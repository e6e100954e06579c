"""What each rank runs in test_ranks.py; whole results, so that they can be compared with ==."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tests.fixtures.emoji import read_pairs
from trainer.comm import Comm
from trainer.config import DataConfig, EvalConfig
from trainer.data.tokenize import train_tokenizer
from trainer.errors import DataError
from trainer.evals import EvalContext, evaluate_all
from trainer.evals.features import embed_images, embed_texts
from trainer.evals.logistic import fit
from trainer.evals.search import nearest
from trainer.types import Batch, Features

IMAGE_SIZE, TEXT_LENGTH, DIM = 16, 12, 24


class LinearModel:
    """Fixed random linear maps of pixels and of bags of tokens; remembers what it was given."""

    def __init__(self, vocabulary: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(3 * IMAGE_SIZE**2, DIM, generator=draw)
        self.tokens = torch.randn(vocabulary, DIM, generator=draw)
        self.calls: list[tuple[str, int]] = []

    def __call__(self, batch: Batch) -> Features:
        self.calls.append(("text" if batch.images is None else "image", len(batch.sample_id)))
        if batch.images is not None:
            return Features(image=F.normalize(batch.images.flatten(1) @ self.pixels, dim=1))
        assert batch.tokens is not None
        assert batch.token_mask is not None
        bags = (self.tokens[batch.tokens] * batch.token_mask[:, :, None]).sum(dim=1)
        return Features(text=F.normalize(bags, dim=1))


def setting(comm: Comm, train: str, *, budget: float = 0.0) -> tuple[LinearModel, EvalContext]:
    captions = [pair["name"] for pair in read_pairs()]
    tokenizer = train_tokenizer(captions, vocab_size=300, length=TEXT_LENGTH)
    data = DataConfig(train=train, bad_sample_budget=budget)
    context = EvalContext(comm, tokenizer, IMAGE_SIZE, TEXT_LENGTH, data, seed=5)
    return LinearModel(len(tokenizer)), context


def evaluations(train: str, test: str) -> list[EvalConfig]:
    one = {"data": test, "target": "subgroup"}
    return [
        EvalConfig(name="zero_shot", label="zero-shot", templates=("{}", "an icon of {}"), **one),
        EvalConfig(name="knn", label="knn", train=train, **one),
        EvalConfig(name="linear_probe", label="probe", train=train, limit=90, **one),
        EvalConfig(name="retrieval", label="retrieval", data=train),
    ]


def evaluate(comm: Comm, train: str, test: str) -> dict[str, Any]:
    """Figures, calls of the model, and the features of all ranks in order."""
    model, context = setting(comm, train)
    figures = evaluate_all(evaluations(train, test), model, context)
    calls = list(model.calls)
    texts = [pair["name"] for pair in read_pairs(67)]
    return {
        "figures": figures,
        "calls": calls,
        "images": comm.gather_rows(embed_images(train, model, context).features).tolist(),
        "texts": embed_texts(texts, model, context).tolist(),
    }


def share(rows: torch.Tensor, comm: Comm, parts: Sequence[int]) -> torch.Tensor:
    """This rank's contiguous share, in proportions that differ; some are empty."""
    bounds = [len(rows) * sum(parts[:i]) // sum(parts) for i in range(len(parts) + 1)]
    return rows[bounds[comm.rank] : bounds[comm.rank + 1]]


def search_and_fit(comm: Comm) -> dict[str, Any]:
    """Ragged shares: neighbours with ties, and a probe."""
    draw = torch.Generator().manual_seed(1)
    queries = torch.randint(-2, 3, (301, 4), generator=draw).float()
    bank = torch.randint(-2, 3, (777, 4), generator=draw).float()
    labels = (queries @ torch.randn(4, 3, generator=draw)).argmax(dim=1)
    parts = {1: (1,), 2: (5, 1), 3: (3, 0, 1)}[comm.world_size]
    found = nearest(share(queries, comm, parts), share(bank, comm, parts[::-1]), k=9, comm=comm)
    weights = fit(
        share(queries, comm, parts).double(),
        share(labels, comm, parts),
        num_classes=3,
        penalty=1e-2,
        comm=comm,
        max_iterations=500,
        tolerance=1e-10,
    )
    return {
        "rows": comm.gather_rows(found.rows).tolist(),
        "scores": comm.gather_rows(found.scores).tolist(),
        "weights": weights.tolist(),
    }


def complaints(comm: Comm, spec: str, damaged: str) -> list[str]:
    """What a rank is told of damage that another rank has met, and of a missing class."""
    model, context = setting(comm, spec)
    said = []
    for data, target in ((damaged, "subgroup"), (spec, "colour")):
        config = EvalConfig(name="zero_shot", label="x", data=data, target=target)
        try:
            evaluate_all([config], model, context)
        except DataError as error:
            said.append(str(error))
    return said


def everything(comm: Comm, train: str, test: str, damaged: str) -> dict[str, Any]:
    return {
        **evaluate(comm, train, test),
        **search_and_fit(comm),
        "complaints": complaints(comm, train, damaged),
    }
