"""A study from its file to its page: cells, plans, and the page."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.fixtures.emoji import write_shards
from tests.scaling.made import along_compute
from tests.test_launch import RUN
from trainer.config import load_run
from trainer.data.remote import expand_shards
from trainer.errors import ConfigError
from trainer.programs.scaling import fit_study, plan_study, report, told, write_laws
from trainer.programs.sweep import all_costs
from trainer.scaling.points import Point
from trainer.scaling.study import cells, load_study

CLIP = "recipe={name: clip, model: {preset: tiny, text_length: 8, vocabulary: 300}}"


def study_in(folder: Path, *, shards: int = 2, **changes: object) -> Path:
    spec = write_shards(folder / "shards", count=12 * shards, per_shard=12)
    base = folder / "base.yaml"
    base.write_text(RUN.format(workdir=folder / "base", spec=spec))
    values = {
        "workdir": str(folder / "study"),
        "base": str(base),
        "recipes": {"clip": [CLIP]},
        "models": {
            "one": ["recipe.model.image={layers: 1}", "recipe.model.text={layers: 1}"],
            "two": ["recipe.model.image={layers: 2}", "recipe.model.text={layers: 2}"],
        },
        "samples_seen": [24, 48],
        "evaluation": "names",
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_smaller_set_of_shards_is_inside_every_larger_one(tmp_path):
    path = study_in(tmp_path, shards=6, nested_shards={"s1": 1, "s3": 3, "s6": 6})
    study = load_study(path)
    found = {cell.data: set(expand_shards(cell.config(study).data.train)) for cell in cells(study)}
    assert [len(found[name]) for name in ("s1", "s3", "s6")] == [1, 3, 6]
    assert found["s1"] < found["s3"] < found["s6"]
    with pytest.raises(ConfigError, match="asks for 7 shards"):
        cells(load_study(study_in(tmp_path, shards=6, nested_shards={"s7": 7})))


def test_cells_are_every_combination_with_budgets_in_whole_steps(tmp_path):
    study = load_study(study_in(tmp_path, seeds=[0, 1], samples_seen=[24, 50]))
    found = cells(study)
    assert len(found) == len({cell.workdir for cell in found}) == 1 * 2 * 1 * 2 * 2
    batch = load_run(study.base).global_batch
    for cell in found:
        assert cell.config(study).steps * batch == cell.samples <= 50
    for wrong, told_so in (
        ({"samples_seen": [48, 24]}, "grow from one budget"),
        ({"recipes": {"a/b": []}}, "names a folder"),
        ({"unique_samples": {"none": 3}}, "no such entry"),
        ({"kind": 3}, "kind"),
    ):
        with pytest.raises(ConfigError, match=told_so):
            load_study(study_in(tmp_path, **wrong))
    with pytest.raises(ConfigError, match="less than one global batch"):
        cells(load_study(study_in(tmp_path, samples_seen=[1])))


@pytest.mark.heavy
def test_twice_the_samples_are_planned_with_twice_the_products(tmp_path):
    text = plan_study(load_study(study_in(tmp_path)), card="a100", world_size=2)
    assert "4 trainings" in text
    assert "hours of a100" in text
    small, large = (float(re.search(rf"{name} .* (\S+e\+\d+)", text)[1]) for name in ("one", "two"))
    assert large > small


@pytest.mark.heavy
def test_budgets_that_cool_one_run_down_are_planned_without_what_they_share(tmp_path):
    path = study_in(tmp_path, samples_seen=[80, 160, 320], models={"one": []})
    whole = {e.cell.samples: e for e in all_costs(load_study(path))}
    path = study_in(tmp_path, samples_seen=[80, 160, 320], models={"one": []}, cooldown=0.2)
    study = load_study(path)
    found = {each.cell.samples: each for each in all_costs(study)}
    assert [each.cell.trunk.step for each in found.values()] == [8, 16, 32]
    for samples, steps_anew in ((80, 10), (160, 20 - 8), (320, 40 - 16)):
        each, alone = found[samples], whole[samples]
        assert each.flops == alone.flops == pytest.approx(whole[80].flops * samples / 80)
        assert each.flops_anew == pytest.approx(alone.flops * steps_anew * 8 / samples)
        assert each.hours == pytest.approx(alone.hours * steps_anew * 8 / samples)
        config = each.cell.config(study)
        assert (config.optim.schedule, config.steps) == ("constant", samples // 8)
        assert config.optim.cooldown_steps == config.steps - each.cell.trunk.step
    assert len({each.cell.chain for each in found.values()}) == 1
    with pytest.raises(ConfigError, match="leaves no step before it of the 1 that 8 samples"):
        cells(load_study(study_in(tmp_path, samples_seen=[8], cooldown=0.2)))


def points_file(folder: Path) -> Path:
    """Two recipes of known laws, one with a name that a page must escape."""
    path = folder / "points.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Point.model_fields))
        writer.writeheader()
        for seed, (name, beta) in enumerate([("clip", 0.5), ("<b>$x_1$</b>", 0.44)]):
            table = along_compute(
                lambda c, beta=beta: beta * (c / 1e18) ** -0.1,
                noise=0.01,
                seed=seed,
                recipe=name,
                corpus="made",
                workdir=str(folder / "cells" / "one"),
                model="m",
            )
            for row in table.rows:
                more = {"parameters": 1e6 * row.compute / 1e15, "samples": 1e7}
                writer.writerow(row.model_dump() | more)
    return path


@pytest.mark.heavy
def test_a_table_of_points_becomes_laws_and_one_page_that_escapes_names(tmp_path):
    changes = {"fit": {"laws": ["power"], "resamples": 200, "frontier": "all"}}
    study = load_study(study_in(tmp_path, **changes))
    found = fit_study(study, points_file(tmp_path))
    text = told(found)
    assert "clip: power law of 24 of 24 points: alpha -0." in text
    assert "crossover: none in range" in text
    assert found.comparisons["<b>$x_1$</b> less clip"].offset.is_told
    assert write_laws(study, found).read_text().startswith("{")
    page = report(study, found).read_text()
    assert "<b>$x_1$</b> less" not in page
    assert "&lt;b&gt;$x_1$&lt;/b&gt;" in page
    assert page.count("data:image/png;base64,") == 5
    assert 'href="../cells/one/cell.yaml"' in page
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    assert np.isfinite([law.objective for laws in found.laws.values() for law in laws]).all()


def test_a_law_with_too_few_points_is_told_and_the_others_are_fitted(tmp_path):
    path = points_file(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:5]) + "\n")
    changes = {"fit": {"laws": ["power", "shifted"], "resamples": 50, "frontier": "all"}}
    found = fit_study(load_study(study_in(tmp_path, **changes)), path)
    assert [law.form.name for law in found.laws["clip"]] == ["power"]
    assert "shifted" in found.refused[0]
    assert "4 points" in found.refused[0]
