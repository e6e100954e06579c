"""A sweep that is killed goes on, trains nothing again, and ends with the same table."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.scaling.forked import Launcher
from tests.scaling.test_study import study_in
from trainer.checkpoint.lock import holder_of, sole_user
from trainer.comm import Comm
from trainer.errors import TrainerError
from trainer.programs.sweep import all_costs, sweep
from trainer.programs.sweep_table import seconds_left, seen, told_table
from trainer.scaling.study import Study, load_study

ROOT = Path(__file__).parents[2]
SMALL = {
    "models": {"one": ["recipe.model.image={layers: 1}", "recipe.model.text={layers: 1}"]},
    "shared": ["save_every=1 steps"],
}


def table_of(study: Study) -> list[dict[str, str]]:
    """The points, without the place where their files lie."""
    with (study.workdir / "points.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "workdir"} for row in csv.DictReader(file)]


def checkpoints(workdir: Path) -> list[int]:
    found = [re.fullmatch(r"step-(\d+)", p.name) for p in workdir.glob("checkpoints/step-*")]
    return sorted(int(match[1]) for match in found if match)


def killed_at(launcher: Launcher, workdir: Path, step: int) -> None:
    """kill -9 of the training in a workdir, once it has saved this step."""
    path = str(workdir / "cell.yaml")
    while max(checkpoints(workdir), default=0) < step:
        time.sleep(0.005)
    os.kill(launcher.pids[path], signal.SIGKILL)


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_cooldowns_of_a_run_that_is_killed_twice_are_those_of_one_that_is_not(tmp_path):
    """Once on the trunk and once in a cool-down; every point equal to the last digit."""
    budgets = {"samples_seen": [24, 160], "cooldown": 0.25, **SMALL}
    said: list[str] = []
    (tmp_path / "whole").mkdir()
    with Launcher(tmp_path) as launcher:
        whole = load_study(study_in(tmp_path / "whole", launcher=launcher.command, **budgets))
        assert sweep(whole, say=said.append).startswith("all 2 cells are done")
        study = load_study(study_in(tmp_path, launcher=launcher.command, **budgets))
        small, large = [each.cell for each in all_costs(study)]
        trunk = large.trunk.workdir
        for place, step in ((trunk, 4), (large.workdir, 16)):
            killer = threading.Thread(target=killed_at, args=(launcher, place, step))
            killer.start()
            with pytest.raises(TrainerError, match=r"1 cells failed.*\(exit 9\)"):
                sweep(study, say=said.append)
            killer.join()
        launcher.started.clear()
        before = (small.workdir / "output.log").read_text()
        assert sweep(study, say=said.append).startswith("all 2 cells are done")
        assert launcher.started == [str(large.workdir / "cell.yaml")]
    assert (small.workdir / "output.log").read_text() == before
    for workdir, first in ((trunk, 4), (large.workdir, 16)):
        begun = re.findall(r"going on from step (\d+) in", (workdir / "output.log").read_text())
        assert int(begun[-1]) >= first
    assert table_of(study) == table_of(whole)
    assert [float(row["samples"]) for row in table_of(study)] == [24, 160]
    assert {row["schedule"] for row in table_of(study)} == {"constant, 0.25 one_minus_sqrt"}
    assert "1 of 2 cells are done already" in said
    assert re.search(r"2/2  clip/one/all/160/seed-0  done  0 min left", said[-1])
    assert "2 of 2 cells done, nothing left" in told_table(all_costs(study))


@pytest.mark.heavy
def test_the_table_shows_who_trains_and_how_long_the_rest_takes(tmp_path):
    study = load_study(study_in(tmp_path, samples_seen=[80, 160], models={"one": []}))
    small, large = all_costs(study)
    (large.cell.workdir / "checkpoints").mkdir(parents=True)
    lines = [f'{{"step": {n}, "timing": {{"seconds_per_step": 2.0}}}}\n' for n in (4, 5)]
    (large.cell.workdir / "metrics.jsonl").write_text("".join(lines))
    (small.cell.workdir / "checkpoints/step-00000010").mkdir(parents=True)
    found = [seen(each) for each in (small, large)]
    assert [(each.state, each.step, each.steps) for each in found] == [
        ("done", 10, 10),
        ("begun", 5, 20),
    ]
    assert seconds_left(found) is None
    with sole_user(large.cell.workdir, Comm.solo()):
        assert holder_of(large.cell.workdir) == f"process {os.getpid()}"
        assert seconds_left([seen(each) for each in (small, large)]) == pytest.approx(15 * 2.0)
        text = told_table([small, large])
    assert re.search(r"clip/one/all/160/seed-0 +trains +5/20", text)
    assert "1 of 2 cells done, 30 s left" in text
    assert holder_of(large.cell.workdir) is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_sweep_of_plain_processes_trains_no_finished_cell_again(tmp_path):
    """kill -9 of the sweep alone: its training saves and ends, or is waited for; then of both."""
    path = study_in(tmp_path, samples_seen=[24, 400], **SMALL)
    study = load_study(path)
    small, large = [each.cell.workdir for each in all_costs(study)]
    command = [sys.executable, str(ROOT / "tools/scaling.py"), "sweep", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for whole_group, step in ((False, 2), (True, 20)):
        started = subprocess.Popen(command, env=environment, start_new_session=True)
        while max(checkpoints(large), default=0) < step:
            assert started.poll() is None
            time.sleep(0.05)
        if whole_group:
            os.killpg(started.pid, signal.SIGKILL)
        else:
            started.kill()
        started.wait()
    assert not (tmp_path / "study/points.csv").exists()
    before = (small / "output.log").read_text()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 cells are done already" in done.stdout
    assert (small / "output.log").read_text() == before
    said = (large / "output.log").read_text()
    assert "stopped at step" in said
    assert re.findall(r"going on from step (\d+) in", said)
    (tmp_path / "whole").mkdir()
    whole = load_study(study_in(tmp_path / "whole", samples_seen=[24, 400], **SMALL))
    sweep(whole)
    assert table_of(study) == table_of(whole)
