"""One, two and three ranks give one and the same number, and call the model equally often."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evals.rank_cases import everything
from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from trainer.comm import Comm


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """(training spec of 150, test spec of 50, a copy of the training spec with a damaged end)."""
    folder = tmp_path_factory.mktemp("emoji")
    write_shards(folder / "good")
    shutil.copytree(folder / "good", folder / "bad")
    _flip_a_late_byte(folder / "bad" / "emoji-000002.tar")
    train = "emoji-{000000..000002}.tar"
    good, bad = folder / "good", folder / "bad"
    return str(good / train), str(good / "emoji-000003.tar"), str(bad / train)


def _flip_a_late_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.rindex(b"IEND") + 5] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def alone(shards: tuple[str, str, str]) -> dict[str, Any]:
    return everything(Comm.solo(), *shards)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_world_size_gives_the_same(
    world_size: int, shards: tuple[str, str, str], alone: dict[str, Any]
) -> None:
    ranks = run_ranks(everything, world_size, *shards)
    for result in ranks:
        assert result["figures"] == alone["figures"]
        assert result["images"] == alone["images"]
        assert result["texts"] == alone["texts"]
        assert result["rows"] == alone["rows"]
        assert result["scores"] == alone["scores"]
        torch.testing.assert_close(
            torch.tensor(result["weights"]), torch.tensor(alone["weights"]), rtol=0, atol=1e-7
        )
        assert result["weights"] == ranks[0]["weights"]
        # The last block is another rank's, yet everyone is told, and nobody waits for ever.
        assert result["complaints"] == alone["complaints"]
        assert result["calls"] == ranks[0]["calls"]
    assert len(ranks[0]["calls"]) < len(alone["calls"])


@pytest.mark.heavy
def test_calls_have_one_size_and_shared_shards_are_encoded_once(alone: dict[str, Any]) -> None:
    calls = alone["calls"]
    assert {size for _, size in calls} == {64}
    # Test 50 -> 1, training 150 -> 3, and both limited to 90 -> 1 + 2 blocks.
    assert [kind for kind, _ in calls].count("image") == 1 + 3 + 1 + 2


def test_complaints_name_what_is_wrong(alone: dict[str, Any]) -> None:
    damage, missing = alone["complaints"]
    assert "emoji-000002.tar" in damage
    assert "'colour'" in missing
    assert "subgroup" in missing


def test_every_figure_stands_beside_its_floor(alone: dict[str, Any]) -> None:
    figures = alone["figures"]
    assert set(figures["zero-shot"]) == {
        *("top1", "top5", "mean_per_class", "chance", "chance_top5", "classes", "samples"),
        *("pixel_1nn", "pixel_5nn", "pixel_1nn_mean_per_class"),
    }
    assert figures["zero-shot"]["samples"] == 50
    assert figures["zero-shot"]["chance"] == pytest.approx(100 / figures["zero-shot"]["classes"])
    for label in ("knn", "probe"):
        assert {"top1", "chance", "pixel_1nn", "mean_per_class"} <= set(figures[label])
    # A random linear map of the pixels keeps most of what 1-NN on pixels can tell.
    assert figures["knn"]["nearest"] > 2 * figures["knn"]["chance"]
    assert figures["probe"]["top1"] > 2 * figures["probe"]["chance"]
    assert figures["retrieval"]["samples"] == figures["retrieval"]["texts"] == 150
    assert figures["retrieval"]["chance_image_to_text_r10"] == pytest.approx(100 * 10 / 150)
