"""The page of a study: lines of equal compute, and what a browser makes of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.scaling.made import grid
from trainer.scaling.fit import fit
from trainer.scaling.isoflop import growth, levels
from trainer.scaling.points import Points, columns
from trainer.scaling.report import Curve, write_page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def by_law(parameters, samples, unique):
    return 0.1 + 40.0 * parameters**-0.35 + 120.0 * samples**-0.3


def test_the_best_size_at_equal_compute_grows_as_the_law_says():
    """C = 6 N D and a law in N and D: the best N grows as C^(b / (a + b))."""
    points = grid(by_law, sizes=12, lengths=12)
    found = levels(points)
    assert len(found) == 5
    assert growth(found) == pytest.approx(0.3 / 0.65, abs=0.03)
    for level in found:
        samples = level.compute / 6 / level.parameters
        assert level.error == pytest.approx(by_law(level.parameters, samples, 0), rel=0.02)
        if level.best is not None:
            assert level.parameters[0] < level.best < level.parameters[-1]


def test_seeds_are_averaged_the_better_data_count_and_nothing_is_extrapolated():
    def rows(errors, seed, unique):
        made = grid(lambda n, d, u: errors, sizes=3, lengths=2).rows
        return [r.model_copy(update={"seed": seed, "unique_samples": unique}) for r in made]

    points = columns([*rows(0.2, 0, 1e9), *rows(0.45, 1, 1e9), *rows(0.9, 0, 1e6)])
    for level in levels(points):
        assert level.error == pytest.approx(0.3, rel=1e-6)
    first, last = levels(points)[0], levels(points)[-1]
    sizes = sorted({row.parameters for row in points.rows})
    spans = [[r.compute for r in points.rows if r.parameters == n] for n in sizes]
    assert first.compute >= max(map(min, spans))
    assert last.compute <= min(map(max, spans))
    assert levels(grid(by_law, sizes=2)) == []
    assert growth([]) is None


def renamed(points: Points, **changes: str) -> Points:
    return columns([row.model_copy(update=changes) for row in points.rows])


def page_in(folder: Path) -> Path:
    curves = []
    for seed, name in enumerate(("clip", "<img src=x> $\\frac{")):
        changes = {"recipe": name, "model": "<script>x</script>", "metric": "$1 - top1"}
        points = renamed(grid(by_law, noise=0.01, seed=seed), workdir=f"cells/{seed}", **changes)
        laws = [fit(points, "power", frontier="pareto", resamples=20)]
        curves.append(Curve(name, points, laws, []))
    title = "Scaling of <b>two</b> & more"
    return write_page(folder / "report.html", curves, title=title, sentences={"<i>a</i>": "<u>"})


@pytest.mark.heavy
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_shows_the_pictures_and_runs_nothing_of_a_name(tmp_path):
    page = page_in(tmp_path)
    text = page.read_text()
    assert all(wrong not in text for wrong in ("<script", "<img src=x", "<i>a", "<b>two"))
    picture = tmp_path / "page.png"
    plain = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    size = "--window-size=1160,3400"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [BROWSER, *plain, profile, size, f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert picture.exists(), done.stderr[-2000:]
    assert "Refused to" not in done.stderr
    shown = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    for colour in ((31, 119, 180), (255, 127, 14)):  # of both curves, in every plot of them
        near = (np.abs(shown - colour).max(axis=2) < 12).any(axis=1)
        bands = np.flatnonzero(np.diff(near.astype(int)) == 1)
        assert len(bands) >= 3, "a picture was not shown"
