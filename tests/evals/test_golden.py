"""The published evaluation code's own numbers, from the same embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.evals.test_sets import png_of, random_pictures, write_set
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import DataConfig, EvalConfig
from trainer.data.shards import ShardSet
from trainer.data.tokenize import token_ids, train_tokenizer
from trainer.evals import EvalContext, run_eval
from trainer.evals.retrieval import CUTOFFS, recalls
from trainer.evals.scores import tally
from trainer.evals.search import nearest
from trainer.evals.zero_shot import classifier, rank_classes
from trainer.types import Batch, Features

GOLDEN = Path(__file__).parents[1] / "golden" / "zeroshot_eval"
CLASSIFICATION = ("classification_c12", "classification_c4_noacc5")
RETRIEVAL = ("retrieval_caps5", "retrieval_ragged")
TEXT_LENGTH = 24


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


class Stored:
    """A model that says the stored rows: of images by sample, of texts by what it reads."""

    def __init__(
        self, images: dict[int, torch.Tensor], texts: dict[tuple[int, ...], torch.Tensor]
    ) -> None:
        self.images, self.texts = images, texts

    def __call__(self, batch: Batch) -> Features:
        if batch.images is not None:
            nothing = torch.zeros_like(next(iter(self.images.values())))
            rows = [self.images.get(number, nothing) for number in batch.sample_id.tolist()]
            return Features(image=F.normalize(torch.stack(rows), dim=1).float())
        assert batch.tokens is not None
        assert batch.token_mask is not None
        read = zip(batch.tokens.tolist(), batch.token_mask.tolist(), strict=True)
        keys = [tuple(t for t, real in zip(*row, strict=True) if real) for row in read]
        rows = torch.stack([self.texts[key] for key in keys])
        return Features(text=F.normalize(rows, dim=1).float())


def evaluated(
    comm: Comm,
    spec: str,
    rows: list[int],
    images: torch.Tensor,
    texts: dict[str, torch.Tensor],
    **config: Any,
) -> dict[str, float]:
    """The figures of shards whose sample i shows image `rows[i]`."""
    tokenizer = train_tokenizer(texts, vocab_size=259, length=TEXT_LENGTH)
    read = token_ids(tokenizer, list(texts), length=TEXT_LENGTH)
    model = Stored(
        {
            int(number): images[row]
            for number, row in zip(ShardSet.open(spec).ids, rows, strict=True)
        },
        {tuple(ids): row for ids, row in zip(read, texts.values(), strict=True)},
    )
    context = EvalContext(comm, tokenizer, 16, TEXT_LENGTH, DataConfig(train=spec), seed=0)
    return run_eval(EvalConfig(label="golden", data=spec, **config), model, context)


def classified(comm: Comm, name: str, spec: str) -> dict[str, float]:
    """Zero-shot classification of shards, from the stored vectors."""
    golden = load(name)
    classes, templates, _ = golden["prompt_embeddings"].shape
    prompts = {
        f"class {c:02d} form {p}": golden["prompt_embeddings"][c, p]
        for c in range(classes)
        for p in range(templates)
    }
    images = golden["image_embeddings"]
    forms = tuple(f"{{}} form {p}" for p in range(templates))
    rows = list(range(len(images)))
    return evaluated(comm, spec, rows, images, prompts, name="zero_shot", templates=forms)


def retrieved(comm: Comm, name: str, spec: str, rows: list[int]) -> dict[str, float]:
    golden = load(name)
    texts = {f"caption {i}": row for i, row in enumerate(golden["text_embeddings"])}
    images = golden["image_embeddings"]
    return evaluated(comm, spec, rows, images, texts, name="retrieval", caption="captions")


def everything(
    comm: Comm, classification: dict[str, str], retrieval: dict[str, tuple[str, str, list[int]]]
) -> dict[str, dict[str, float]]:
    found = {name: classified(comm, name, spec) for name, spec in classification.items()}
    return found | {
        form: retrieved(comm, name, spec, rows) for form, (name, spec, rows) in retrieval.items()
    }


def written(folder: Path, name: str, values: list[dict[str, Any]], rows: list[int]) -> str:
    """A shard of pictures that differ, each the one of its row."""
    pictures = [png_of(picture) for picture in random_pictures(max(rows) + 1, seed=5)]
    samples = [(pictures[row], value) for row, value in zip(rows, values, strict=True)]
    return write_set(folder / f"{name}.tar", samples)


def forms_of(name: str, folder: Path) -> dict[str, tuple[str, str, list[int]]]:
    """Ways to write several captions a picture: (array file, shards, image of each sample)."""
    owners = load(name)["text_image_index"].tolist()
    pictures = list(range(max(owners) + 1))
    of_each = [[f"caption {t}" for t, i in enumerate(owners) if i == p] for p in pictures]
    order = sorted(range(len(owners)), key=lambda text: (text % 3, text))  # copies lie far apart
    ways = {
        "list": ([{"captions": texts} for texts in of_each], pictures),
        "lines": ([{"captions": "\n".join(texts)} for texts in of_each], pictures),
        "a sample each": (
            [{"captions": f"caption {t}"} for t in order],
            [owners[t] for t in order],
        ),
        "a list in every copy": (
            [{"captions": of_each[p], "pix": f"p{p}"} for p in pictures * 2],
            pictures * 2,
        ),
    }
    return {
        f"{name} {way}": (name, written(folder, f"{name} {way}", values, rows), rows)
        for way, (values, rows) in ways.items()
    }


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("golden")
    classification = {}
    for name in CLASSIFICATION:
        labels = load(name)["labels"].tolist()
        values = [{"concept": f"class {label:02d}"} for label in labels]
        classification[name] = written(folder, name, values, list(range(len(labels))))
    retrieval = {}
    for name in RETRIEVAL:
        retrieval |= forms_of(name, folder)
    return classification, retrieval


@pytest.fixture(scope="module")
def figures(sets: tuple[dict[str, str], dict[str, Any]]) -> dict[str, dict[str, float]]:
    return everything(Comm.solo(), *sets)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_from_shards_to_figures(
    name: str, figures: dict[str, dict[str, float]]
) -> None:
    golden, found = load(name), figures[name]
    assert found["top1"] == 100 * golden["num_correct_top1"].item() / len(golden["labels"])
    recall = 100 * golden["mean_per_class_recall"].item()
    assert found["mean_per_class"] == pytest.approx(recall, abs=1e-11)
    assert ("top5" in found) == ("acc5" in golden)
    if "acc5" in golden:
        assert found["top5"] == 100 * golden["num_correct_top5"].item() / len(golden["labels"])


@pytest.mark.parametrize("way", ["list", "lines", "a sample each", "a list in every copy"])
@pytest.mark.parametrize("name", RETRIEVAL)
def test_retrieval_from_shards_to_figures(
    name: str, way: str, figures: dict[str, dict[str, float]]
) -> None:
    golden, found = load(name), figures[f"{name} {way}"]
    places = {k: place for place, k in enumerate(golden["k"].tolist()) if k in CUTOFFS}
    assert len(places) >= 2
    assert found["pictures"] == len(golden["image_embeddings"])
    assert found["texts"] == len(golden["text_embeddings"])
    for direction, key in (
        ("text_to_image", "image_retrieval_recall"),
        ("image_to_text", "text_retrieval_recall"),
    ):
        for k, place in places.items():
            assert torch.tensor(found[f"{direction}_r{k}"] / 100) == golden[key][place]


@pytest.mark.parametrize("name", RETRIEVAL)
def test_recalls_at_every_cutoff(name: str) -> None:
    golden = load(name)
    images, texts = golden["image_embeddings"], golden["text_embeddings"]
    of_images = [frozenset({str(i)}) for i in range(len(images))]
    of_texts = [frozenset({str(i)}) for i in golden["text_image_index"].tolist()]
    cutoffs = golden["k"].tolist()
    for queries, gallery, of_queries, of_gallery, expected in (
        (texts, images, of_texts, of_images, golden["image_retrieval_recall"]),
        (images, texts, of_images, of_texts, golden["text_retrieval_recall"]),
    ):
        found = recalls(queries, gallery, of_queries, of_gallery, cutoffs=cutoffs, comm=Comm.solo())
        assert torch.equal(
            torch.tensor([found[k] / 100 for k in cutoffs]).float(), expected.float()
        )


def test_ranks_agree_with_one_process(
    sets: tuple[dict[str, str], dict[str, Any]], figures: dict[str, dict[str, float]]
) -> None:
    assert run_ranks(everything, 3, *sets) == [figures] * 3


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classifier_and_logits(name: str) -> None:
    golden = load(name)
    images, labels = golden["image_embeddings"], golden["labels"]
    classes = classifier(golden["prompt_embeddings"])
    torch.testing.assert_close(classes.T, golden["classifier"], rtol=0, atol=1e-12)
    num_classes = classes.shape[0]
    found = nearest(F.normalize(images, dim=1), classes, k=num_classes, comm=Comm.solo())
    logits = torch.empty_like(golden["logits"]).scatter_(1, found.rows, 100 * found.scores.float())
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-6, atol=1e-5)

    ranked = rank_classes(images, classes)
    confusion = torch.zeros_like(golden["confusion"])
    confusion.index_put_((labels, ranked[:, 0]), torch.tensor(1), accumulate=True)
    assert torch.equal(confusion, golden["confusion"])
    assert tally(ranked, labels[:, None], num_classes=num_classes, comm=Comm.solo())[
        "top1"
    ] == pytest.approx(100 * golden["acc1"].item(), abs=1e-12)
