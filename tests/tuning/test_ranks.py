"""One rank, two and four: the same terms, gradients, weights, figures. One launch for all."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from tests.tuning.rank_cases import everything
from tests.tuning.store_cases import made_store
from trainer.comm import Comm


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_change_nothing_but_rounding(tmp_path, world_size):
    folder = made_store(tmp_path / "store")
    alone = everything(Comm.solo(), folder)
    for found in run_ranks(everything, world_size, folder, timeout_seconds=300.0):
        for case, values in alone.items():
            # AdamW's first steps are as long for a small gradient as for a large one.
            near = (1e-10, 1e-12) if case.startswith("terms") else (2e-3, 2e-4)
            for name, value in values.items():
                torch.testing.assert_close(
                    found[case][name], value, rtol=near[0], atol=near[1], msg=f"{case}: {name}"
                )
