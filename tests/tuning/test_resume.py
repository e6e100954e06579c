"""A comparison that was killed goes on behind the last whole cell, and never takes another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tuning.store_cases import made_store, opened
from trainer.comm import Comm
from trainer.programs import tune
from trainer.programs.tune import Sets, compare_methods


def compared(sets: Sets, out: Path) -> str:
    return compare_methods(sets, ["linear"], [0, 1], out, Comm.solo(), say=lambda line: None)


@pytest.mark.heavy
def test_cells_that_are_there_are_not_trained_again_and_the_bytes_are_equal(tmp_path, monkeypatch):
    data = opened(made_store(tmp_path / "store"))
    sets = Sets(data, {"same": data})
    expected = compared(sets, tmp_path / "whole")
    really, trained = tune._measured, []

    def counting(sets, method, seed, comm):
        if len(trained) == 1 and seed == 1 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        trained.append(seed)
        return really(sets, method, seed, comm)

    monkeypatch.setattr(tune, "_measured", counting)
    with pytest.raises(KeyboardInterrupt):
        compared(sets, tmp_path / "killed")
    (tmp_path / "again").touch()
    assert compared(sets, tmp_path / "killed") == expected
    assert trained == [0, 1]
    for name in ("results.json", "table.md", "cells/linear-0.json", "cells/linear-1.json"):
        whole, again = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert again.read_bytes() == whole.read_bytes()


def test_a_cell_of_other_features_is_trained_anew(tmp_path):
    first, other = (opened(made_store(tmp_path / str(n), count=n)) for n in (45, 60))
    compared(Sets(first, {"same": first}), tmp_path / "out")
    before = json.loads((tmp_path / "out" / "cells" / "linear-0.json").read_text())
    compared(Sets(other, {"same": other}), tmp_path / "out")
    after = json.loads((tmp_path / "out" / "cells" / "linear-0.json").read_text())
    assert before["asked"] != after["asked"]
