"""What a week of reading leaves in memory."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from tests.data.streams import open_stream, write_shards
from tests.engine.test_memory import resident

BATCHES = 20_000
WARM_UP = 2_000
EVERY = 500


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_thousand_batches_over_many_epochs_leave_nothing_behind(tmp_path):
    """Less than 1 MB per thousand batches, by the slope of all that was measured."""
    stream = open_stream(write_shards(tmp_path, [20, 20]), global_batch=2, workers=0, seed=1)
    found = []
    for number in range(BATCHES):
        stream.take()
        if number >= WARM_UP and number % EVERY == 0:
            gc.collect()
            found.append((number, resident()))
    stream.close()
    numbers, sizes = np.array(found, dtype=np.float64).T
    slope = np.polyfit(numbers / 1000, sizes / 2**20, 1)[0]
    print(f"{slope:.4f} MiB per thousand batches, over {2 * BATCHES / 40:.0f} epochs")
    assert slope < 1.0
