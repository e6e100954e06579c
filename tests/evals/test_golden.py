"""The published evaluation code's own numbers, from the same embeddings."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainer.comm import Comm
from trainer.evals.retrieval import recalls
from trainer.evals.scores import tally
from trainer.evals.search import nearest
from trainer.evals.zero_shot import classifier, rank_classes

GOLDEN = Path(__file__).parents[1] / "golden" / "zeroshot_eval"


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


@pytest.mark.parametrize("name", ["classification_c12", "classification_c4_noacc5"])
def test_zero_shot_classification(name: str) -> None:
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

    figures = tally(ranked, labels[:, None], num_classes=num_classes, comm=Comm.solo())
    assert figures["top1"] == pytest.approx(100 * golden["acc1"].item(), abs=1e-12)
    assert figures["top1"] == 100 * golden["num_correct_top1"].item() / len(labels)
    recall = 100 * golden["mean_per_class_recall"].item()
    assert figures["mean_per_class"] == pytest.approx(recall, abs=1e-11)
    assert ("top5" in figures) == ("acc5" in golden)
    if "acc5" in golden:
        assert figures["top5"] == 100 * golden["num_correct_top5"].item() / len(labels)


@pytest.mark.parametrize("name", ["retrieval_caps5", "retrieval_ragged"])
def test_retrieval(name: str) -> None:
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
        shares = torch.tensor([found[k] / 100 for k in cutoffs]).float()
        assert torch.equal(shares, expected.float())
