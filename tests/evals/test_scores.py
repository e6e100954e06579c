"""Votes, percentages and chance against the plainest code."""

import math
import random

import pytest
import torch

from trainer.comm import Comm
from trainer.evals.knn import TEMPERATURE, vote
from trainer.evals.scores import NO_ANSWER, chance, tally
from trainer.evals.search import Neighbours, nearest

SOLO = Comm.solo()


def test_vote_is_the_weighted_sum_over_the_nearest() -> None:
    draw = torch.Generator().manual_seed(3)
    queries = torch.nn.functional.normalize(torch.randn(50, 4, generator=draw).double(), dim=1)
    bank = torch.nn.functional.normalize(torch.randn(120, 4, generator=draw).double(), dim=1)
    labels = torch.randint(7, (120,), generator=draw)
    ranked = vote(nearest(queries, bank, k=20, comm=SOLO), labels, num_classes=7)
    for query, guesses in zip(queries, ranked.tolist(), strict=True):
        scores = [(float(query @ row), int(label)) for row, label in zip(bank, labels, strict=True)]
        votes = dict.fromkeys(range(7), 0.0)
        for score, label in sorted(scores, reverse=True)[:20]:
            votes[label] += math.exp(score / TEMPERATURE)
        best = sorted(votes, key=lambda label: (-votes[label], label))[:5]
        assert guesses == [label if votes[label] else -1 for label in best]


def test_a_bank_smaller_than_k_votes_with_what_it_has() -> None:
    found = Neighbours(torch.tensor([[0.9, 0.8, -torch.inf]]), torch.tensor([[1, 0, -1]]))
    assert vote(found, torch.tensor([2, 0]), num_classes=3).tolist() == [[0, 2, -1]]


def test_a_class_without_a_vote_is_no_guess() -> None:
    """Twenty neighbours of two classes of seven: five guesses would make the alphabet right."""
    labels = torch.tensor([6, 4])
    rows = torch.tensor([[0] * 20, [0, 1] * 10])
    found = Neighbours(torch.full((2, 20), -0.9), rows)
    ranked = vote(found, labels, num_classes=7)
    assert ranked.tolist() == [[6, -1, -1, -1, -1], [4, 6, -1, -1, -1]]
    for right, expected in ((0, 0.0), (4, 50.0), (6, 100.0)):
        answers = torch.full((2, 1), right)
        assert tally(ranked, answers, num_classes=7, comm=SOLO)["top5"] == expected


def test_tally_counts_every_right_answer_and_each_class_once() -> None:
    ranked = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [1, 0, 2, 3, 4], [2, 1, 0, 3, 4]])
    answers = torch.tensor([[0, NO_ANSWER], [0, 1], [5, NO_ANSWER], [0, NO_ANSWER]])
    figures = tally(ranked, answers, num_classes=6, comm=SOLO)
    # Class 0: two of three at the first guess; class 5: none of one.
    assert figures == {"top1": 50.0, "top5": 75.0, "mean_per_class": pytest.approx(100 / 3)}


def test_filler_never_matches_filler() -> None:
    ranked = torch.tensor([[-1, -1, -1, -1, -1]])
    figures = tally(ranked, torch.tensor([[0, NO_ANSWER]]), num_classes=1, comm=SOLO)
    assert figures["top1"] == figures["top5"] == 0.0


@pytest.mark.heavy
def test_chance_is_that_of_drawing_without_replacement() -> None:
    rights = torch.tensor([0, 1, 2, 5])
    draw = random.Random(0)
    trials = 40_000
    hits = sum(
        any(item < right for item in draw.sample(range(9), 3))
        for _ in range(trials)
        for right in rights.tolist()
    )
    expected = chance(rights, num_choices=9, num_guesses=3, comm=SOLO)
    assert expected == pytest.approx(100 * hits / (4 * trials), abs=0.5)
    assert chance(torch.tensor([1]), num_choices=4, num_guesses=9, comm=SOLO) == 100.0
