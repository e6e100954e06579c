"""Views drawn on a GPU: the same pixels by Triton's interpreter, and how few launches they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.launches import launches_by_name
from trainer.config import AugmentConfig
from trainer.data.views import draw_view

pytest.importorskip("triton", reason="Triton's wheel is for Linux")
ROOT = Path(__file__).parents[2]
KERNELS = ("contrast_sums", "colours", "blurred_along")


@pytest.mark.heavy
def test_pixels_are_those_of_torchs_operations() -> None:
    """Flips, four changes in every order, gray, blur, solarize; an image of one colour too."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_colour"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr
    rows: list[dict[str, Any]] = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["changed"] == (row["case"] != "nothing"), row
        assert row["differing"] == 0, row


class Launched:
    """Stands for a kernel on tensors without numbers."""

    count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size <= 65_535 for size in grid[1:]), grid

        def run(*_: Any, **__: Any) -> None:
            Launched.count += 1

        return run


@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig(solarize_probability=0.2)])
def test_launches_of_a_batch_do_not_grow_with_it(config: AugmentConfig) -> None:
    """937 for 64 images, when every change of every turn picked its rows."""
    counts = [launches(count, config) for count in (64, 512)]
    assert counts[0] == counts[1] <= 20


def launches(count: int, config: AugmentConfig) -> int:
    from trainer.data.device_views import augmented

    draws = draw_view(torch.arange(count), torch.zeros(count).long(), seed=3, purpose="train")
    images = torch.empty(count, 3, 224, 224, dtype=torch.uint8, device="meta")
    Launched.count = 0
    kernels = dict.fromkeys(KERNELS, Launched())
    with patch.multiple("trainer.kernels.triton_colour", **kernels):
        named = launches_by_name(lambda: augmented(images, draws, config=config), "meta")
    return sum(named.values()) + Launched.count
