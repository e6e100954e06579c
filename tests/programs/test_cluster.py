"""A store clustered by the command: killed at any moment, on any ranks, to the same bytes."""

from __future__ import annotations

import hashlib
import html
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import load_file
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from tests.cluster.stores import poison, write_store
from tests.cluster.test_kmeans import distances, mixture
from tests.ranks import run_ranks
from tests.test_loop import config_in
from trainer.cluster.kmeans import KMeansConfig
from trainer.comm import Comm
from trainer.data.labels import ClusterLabels
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError
from trainer.programs.cluster import ClusterJob, cluster_store, read_figures
from trainer.store import EmbeddingStore

ROOT = Path(__file__).parents[2]
KMEANS = KMeansConfig(
    clusters=30,
    iterations=6,
    start="hierarchical",
    spherical=True,
    assignment="two_level",
    probes=3,
    precision="float32",
)
JOB = ClusterJob(kmeans=KMEANS, per_sample=4, min_cosine=0.2, duplicate_cosine=0.9999)


def ids_of(count: int) -> torch.Tensor:
    return torch.arange(count) * 7919 + 2**40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clustered") / "store"
    rows = mixture(700, 12, components=25, spread=0.3, seed=1)
    write_store(folder, rows, ids_of(700), sizes=[200, 0, 150, 350])
    return folder


def silent(line: str) -> None: ...


def digests(out: Path) -> dict[str, str]:
    """Of everything that a finished run leaves, apart from its state."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "state" not in path.parts and path.name != "lock"
    }


@pytest.fixture(scope="module")
def whole(store: Path) -> dict[str, str]:
    out = store.parent / "whole"
    cluster_store(store, out, JOB, Comm.solo(), say=silent)
    return digests(out)


def clustered(comm: Comm, store: str, out: str) -> None:
    cluster_store(Path(store), Path(out), JOB, comm, say=silent)


# -- the same bytes ---------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_same_bytes_on_any_ranks(
    world_size: int, store: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    run_ranks(clustered, world_size, str(store), str(tmp_path / "out"))
    assert digests(tmp_path / "out") == whole


GRIDDED = ClusterJob(
    kmeans=KMeansConfig(clusters=30, iterations=4, spherical=True, row_block=64),
    per_sample=4,
    min_cosine=0.2,
    duplicate_cosine=0.9999,
)


def gridded(comm: Comm, store: str, out: str, grid: int) -> list[str]:
    """Two iterations' worth of states on one grid, then a run of the whole on another."""
    said: list[str] = []
    for size in (comm.world_size, grid):
        kmeans = GRIDDED.kmeans.model_copy(update={"grid": size})
        job = GRIDDED.model_copy(update={"kmeans": kmeans})
        cluster_store(Path(store), Path(out), job, comm, say=said.append)
        if comm.is_main and size != grid:
            # as if it had been stopped after its last update
            for name in ("centroids.safetensors", "clusters.json", "labels.npy", "ids.npy"):
                (Path(out) / name).unlink()
            shutil.rmtree(Path(out) / "labels")
        comm.barrier()
    return said


@pytest.mark.parametrize(("world_size", "grid"), [(2, 1), (4, 2)])
def test_the_same_bytes_on_any_grid_which_may_change_on_the_way(
    world_size: int, grid: int, store: Path, tmp_path: Path
) -> None:
    alone = cluster_store(store, tmp_path / "alone", GRIDDED, Comm.solo(), say=silent)
    out = tmp_path / "out"
    said = run_ranks(gridded, world_size, str(store), str(out), grid)
    assert "going on after iteration 4" in said[0]
    assert digests(out) == digests(alone)


# -- a disk that fails ------------------------------------------------------------------------


def cut_while_running(comm: Comm, store: str, out: str, moment: str, grid: int) -> str:
    """What each rank is told when the last shard, rank 0's, is cut short on the way."""
    path = Path(store) / "train-000003.vectors"

    def say(line: str) -> None:
        if moment in line:
            os.truncate(path, 5000)

    kmeans = KMeansConfig(clusters=20, iterations=9, row_block=64, grid=grid)
    try:
        cluster_store(Path(store), Path(out), ClusterJob(kmeans=kmeans), comm, say=say)
    except DataError as error:
        return str(error)
    return "it went on"


@pytest.mark.parametrize("grid", [1, 2])
@pytest.mark.parametrize("moment", ["iteration 1 of 9", "train-000001: clusters of"])
def test_a_file_that_is_cut_under_a_run_stops_all_ranks_by_its_name(
    grid: int, moment: str, tmp_path: Path
) -> None:
    rows = mixture(700, 12, components=25, spread=0.3, seed=1)
    write_store(tmp_path / "store", rows, ids_of(700), sizes=[200, 50, 150, 300])
    arguments = (str(tmp_path / "store"), str(tmp_path / "out"), moment, grid)
    told = run_ranks(cut_while_running, 2, *arguments, timeout_seconds=50.0)
    assert told[0] == told[1]
    assert re.fullmatch(
        r"rank \d: .*train-000003\.vectors should hold \d+ bytes, found 5000;.*", told[0]
    )


def killed(store: Path, out: Path, *, after_events: int | None, after_seconds: float) -> bool:
    """Run the job in a forked process that is killed; True if it ended before."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a forked process can't use the threads of its parent
            signal.alarm(120)
            if after_events is not None:
                _die_after(after_events)
            cluster_store(store, out, JOB, Comm.solo(), say=silent)
        except BaseException:
            os._exit(3)
        os._exit(0)
    if after_events is None:
        time.sleep(after_seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL, "it hangs"
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "it failed by itself"
    return os.WIFEXITED(status)


def _die_after(events: int) -> None:
    """Kill this process at the n-th time that it is about to touch the file system."""
    left = events

    def watch(event: str, arguments: object) -> None:
        nonlocal left
        if event == "open" or event.startswith(("os.", "shutil.")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@pytest.mark.heavy
def test_killed_at_thirty_moments_it_ends_with_the_same_bytes(
    store: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    """Each kill is on top of what the ones before left, until a run ends by itself."""
    draw, kills, out, rounds = random.Random(5), 0, tmp_path / "out", 0
    while kills < 30:
        by_event = kills % 3 != 2
        moment = draw.randrange(1, 110) if by_event else None
        ended = killed(store, out, after_events=moment, after_seconds=draw.uniform(0.0, 1.0))
        kills += not ended
        if ended:
            assert digests(out) == whole
            rounds += 1
            out = tmp_path / f"out-{rounds}"
    assert killed(store, out, after_events=10**9, after_seconds=0.0)
    assert digests(out) == whole


# -- what is in it ----------------------------------------------------------------------------


def test_labels_are_the_nearest_centroids_and_figures_are_theirs(
    store: Path, tmp_path: Path
) -> None:
    job = ClusterJob(kmeans=KMeansConfig(clusters=20, iterations=4), per_sample=3)
    out = cluster_store(store, tmp_path / "out", job, Comm.solo(), say=silent)
    centroids = load_file(out / "centroids.safetensors")["centroids"]
    rows = EmbeddingStore.open(store).rows(ids_of(700))
    exact = distances(rows, centroids).sort(1)
    labels = ClusterLabels.open(out)
    assert torch.equal(labels.top(ids_of(700)), exact.indices[:, :3])
    figures = read_figures(out)
    assert figures["mean_squared_distance"] == pytest.approx(float(exact.values[:, 0].mean()))
    assert figures["samples"] == figures["clustered"] == 700
    counts = torch.bincount(labels.labels.long(), minlength=20)
    assert figures["largest"] == int(counts.max())
    assert figures["size_p50"] == sorted(counts.tolist())[10]


@pytest.mark.heavy
def test_a_warm_start_goes_on_from_a_table(store: Path, tmp_path: Path) -> None:
    first = ClusterJob(kmeans=KMeansConfig(clusters=20, iterations=3))
    out = cluster_store(store, tmp_path / "first", first, Comm.solo(), say=silent)
    kmeans = KMeansConfig(clusters=20, iterations=2)
    warm = ClusterJob(kmeans=kmeans, warm_start=out / "centroids.safetensors")
    again = cluster_store(store, tmp_path / "again", warm, Comm.solo(), say=silent)
    five = ClusterJob(kmeans=KMeansConfig(clusters=20, iterations=5))
    straight = cluster_store(store, tmp_path / "straight", five, Comm.solo(), say=silent)
    assert digests(again)["labels.npy"] == digests(straight)["labels.npy"]
    wrong = ClusterJob(kmeans=KMeansConfig(clusters=21), warm_start=warm.warm_start)
    with pytest.raises(ConfigError, match=r"\(20, 12\) and must be \(21, 12\)"):
        cluster_store(store, tmp_path / "wrong", wrong, Comm.solo(), say=silent)


# -- mistakes ---------------------------------------------------------------------------------


def test_mistakes_are_told(store: Path, tmp_path: Path) -> None:
    job = ClusterJob(kmeans=KMeansConfig(clusters=5, iterations=1))
    out = cluster_store(store, tmp_path / "out", job, Comm.solo(), say=silent)
    other = job.model_copy(update={"per_sample": 2})
    with pytest.raises(DataError, match="another per_sample"):
        cluster_store(store, out, other, Comm.solo(), say=silent)
    many = ClusterJob(kmeans=KMeansConfig(clusters=701))
    with pytest.raises(ConfigError, match="701 clusters need at least as many points"):
        cluster_store(store, tmp_path / "many", many, Comm.solo(), say=silent)
    same = tmp_path / "same"
    write_store(same, torch.cat([torch.ones(40, 6), torch.zeros(9, 6)]), ids_of(49), sizes=[49])
    without = ClusterJob(kmeans=KMeansConfig(clusters=5), duplicate_cosine=0.98)
    with pytest.raises(ConfigError, match=r"near-duplicates .*2 of 49 are left; use at most 2"):
        cluster_store(same, tmp_path / "none left", without, Comm.solo(), say=silent)
    bad = tmp_path / "bad"
    rows = mixture(60, 12, components=5, spread=0.3, seed=1)
    write_store(bad, rows, ids_of(60), sizes=[20, 40])
    poison(bad, "train-000001", torch.tensor([torch.inf]))
    with pytest.raises(DataError, match=str(int(ids_of(60)[20]))):
        cluster_store(bad, tmp_path / "poisoned", job, Comm.solo(), say=silent)
    path = bad / "train-000000.vectors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-000000\.vectors should hold"):
        cluster_store(bad, tmp_path / "cut", job, Comm.solo(), say=silent)


# -- the command ------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/cluster.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_command_runs_compares_and_names_the_next(store: Path, tmp_path: Path) -> None:
    told = []
    for name, seed in (("one", 1), ("two", 2)):
        options = ["--clusters", 12, "--iterations", 3, "--seed", seed, "--out", tmp_path / name]
        more = ["--compare", tmp_path / "one"] if name == "two" else []
        done = command(store, *options, *more)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert "iteration 3 of 3: mean squared distance" in told[0]
    assert "% of the samples moved" in told[0]
    assert "GiB per rank" in told[0]
    assert "next: " in told[0]
    quality = json.loads((tmp_path / "two" / "quality.json").read_text())
    assert 0.2 < quality["nmi_compared"] < 1.0
    assert quality["samples_compared"] == 700


def test_a_plan_needs_no_store() -> None:
    options = "--plan --points 400000000 --dim 768 --ranks 8 --peak-tflops 989 --clusters 1000000"
    done = command(*options.split())
    assert done.returncode == 0, done.stderr
    assert "6.14e+17 FLOP a pass" in done.stdout
    gib = float(done.stdout.split("GiB per rank: ")[1].split()[0])
    assert gib < 80
    done = command(*options.replace("1000000", "10000000").split(), "--grid", 4)
    assert "grid 2 x 4: " in done.stdout


def test_the_page_shows_samples_and_figures(tmp_path: Path) -> None:
    spec = config_in(tmp_path).data.train
    shards = ShardSet.open(spec)
    ids = torch.from_numpy(shards.ids.copy())
    rows = mixture(len(ids), 8, components=6, spread=0.2, seed=1)
    write_store(tmp_path / "store", rows, ids, sizes=[len(ids)])
    out = tmp_path / "out"
    options = ["--clusters", 6, "--iterations", 5, "--images", spec, "--classes", "subgroup"]
    done = command(tmp_path / "store", "--out", out, *options, "--shown", 5)
    assert done.returncode == 0, done.stderr
    page = (out / "clusters.html").read_text()
    caption = shards.read(0).fields["txt"].decode()
    assert page.count("<section") == 5
    assert any(
        shards.read(i).fields["txt"].decode() in html.unescape(page) for i in range(len(ids))
    ), caption
    assert "nmi_classes" in page
    assert "nearest: " in page
    assert (out / "clusters.png").stat().st_size > 1000
    board = out / "tensorboard"
    assert list(board.glob("events.*"))
    config = ProjectorConfig()
    text_format.Parse((board / "projector_config.pbtxt").read_text(), config)
    rows = (board / config.embeddings[0].tensor_path).read_text().splitlines()
    names = (board / config.embeddings[0].metadata_path).read_text().splitlines()
    assert (len(rows), len(names)) == (5, 6)
    assert all(len(row.split("\t")) == 8 for row in rows)
    assert all(name.count("\t") == 2 for name in names)
    quality = json.loads((out / "quality.json").read_text())
    assert 0.0 <= quality["nmi_classes"] < 0.9
    assert quality["samples_classes"] > 0
