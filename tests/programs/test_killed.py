"""Tools under their launchers: the same bytes from any of them, and after kills at any moment.

Ranks are killed while the tool writes: when so many files are there, as a number says that is drawn
from a seed, and then without a word (kill -9), some of them or all. The call after the last kill is
not disturbed.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.curation.corpus import picture
from tests.data.tars import write_tar
from tests.models import folders
from tests.models.small import WORDS
from tests.ranks import free_port
from trainer.data.index import write_index
from trainer.data.pixels import Pixels

ROOT = Path(__file__).parents[2]
SHARDS, ROWS = 12, 24
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[str, Path, Path]:
    return written(tmp_path_factory.mktemp("killed"))


def written(folder: Path) -> tuple[str, Path, Path]:
    """Shards, a pair of towers, a bank."""
    for shard in range(SHARDS):
        samples = {}
        for row in range(ROWS):
            number = shard * ROWS + row
            text = f"{WORDS[number % 5]} and {WORDS[number % 7 + 10]}"
            fields = {"png": picture(number), "txt": text.encode()}
            fields["json"] = f'{{"kind": "{WORDS[number % 3]}"}}'.encode()
            samples[f"{number:04d}"] = fields
        write_index(write_tar(folder / f"{shard:03d}.tar", samples))
    model = folders.save(folder / "model", folders.clip)[0]
    Pixels(32).processor().save_pretrained(model)
    bank = folder / "bank.txt"
    bank.write_text("\n".join(WORDS[:5]))
    return f"{folder}/{{000..{SHARDS - 1:03d}}}.tar", Path(model), bank


def launched(name: str, world_size: int) -> list[str]:
    """The beginning of a command."""
    binaries, port = Path(sys.executable).parent, str(free_port())
    if name == "deepspeed":
        deepspeed = str(binaries / "deepspeed")
        return [deepspeed, "--num_gpus", str(world_size), "--master_port", port]
    if name == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--master-port", port]
        return [*run, "--nproc-per-node", str(world_size)]
    return [sys.executable]


def started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finished(command: Sequence[str]) -> None:
    with started(command) as process:
        _, told = process.communicate(timeout=400)
    assert process.returncode == 0, told.decode()[-4000:]


def ranks_of(launcher: int, tool: str) -> list[psutil.Process]:
    """The launcher's descendants that run the tool."""
    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.Error):
            if tool in process.cmdline() and "launcher.launch" not in str(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def files_of(out: Path) -> dict[str, bytes]:
    """What was found. Pictures say nothing that tables do not, and leftovers are nobody's."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix not in (".png", ".partial")
    }


def killed(command: Sequence[str], out: Path, *, draw: random.Random, most: int) -> None:
    """One call whose ranks, some or all, are killed when a number of files is there."""
    wanted, tool = draw.randint(1, most), next(word for word in command if "tools/" in word)
    with started(command) as process:
        while process.poll() is None and sum(1 for _ in out.rglob("*")) < wanted:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        ranks = ranks_of(process.pid, tool) if process.poll() is None else []
        for rank in draw.sample(ranks, draw.randint(1, len(ranks))) if ranks else []:
            rank.kill()
        try:
            process.communicate(timeout=120)
        finally:
            for rank in ranks:
                with suppress(psutil.Error):
                    rank.kill()


def test_scan_under_torchrun_and_deepspeed_gives_the_bytes_of_one_process(corpus, tmp_path):
    spec, model, bank = corpus
    found = {}
    for name, world_size in (("python", 1), ("torchrun", 2), ("deepspeed", 4)):
        out = tmp_path / name
        asked = ["--bank", str(bank), "--texts", "--near-duplicates", "4", "--out", str(out)]
        scan = ["tools/scan.py", "--data", spec, "--model", str(model), *asked]
        finished([*launched(name, world_size), *scan])
        found[name] = files_of(out)
    assert found["torchrun"] == found["python"]
    assert found["deepspeed"] == found["python"]
    assert len(found["python"]) > 4 * SHARDS


def test_scan_and_reduce_go_on_after_kills_on_four_ranks(corpus, tmp_path):
    spec, model, bank = corpus
    whole, out = tmp_path / "whole", tmp_path / "out"
    scan = ["tools/scan.py", "--data", spec, "--model", str(model), "--bank", str(bank)]
    scan += ["--near-duplicates", "4", "--out"]
    finished([sys.executable, *scan, str(whole)])
    draw = random.Random(7)
    for _ in range(3):
        command = [*launched("torchrun", 4), *scan, str(out)]
        killed(command, out, draw=draw, most=5 * SHARDS)
    finished([*launched("torchrun", 4), *scan, str(out)])
    assert files_of(out) == files_of(whole)

    reduce = ["tools/reduce.py", str(whole), "--data", spec, "--clusters", "6", "share=0.4"]
    reduce += ["duplicate_cosine=0.9999", "gate=0.1", "alpha=0.5", "--out"]
    finished([sys.executable, *reduce, str(tmp_path / "kept")])
    for _ in range(3):
        command = [*launched("torchrun", 4), *reduce, str(tmp_path / "left")]
        most = len(files_of(tmp_path / "kept"))
        killed(command, tmp_path / "left", draw=draw, most=most)
    finished([*launched("torchrun", 4), *reduce, str(tmp_path / "left")])
    kept, left = (_selections(tmp_path / name) for name in ("kept", "left"))
    assert left == kept
    assert len(kept) > 2 * SHARDS


def _selections(out: Path) -> dict[str, bytes]:
    """All but the k-means' record of its own progress."""
    return {n: v for n, v in files_of(out).items() if not n.startswith("clusters/")}


def test_counts_and_tuned_cells_go_on_after_kills(corpus, tmp_path):
    spec, model, bank = corpus
    count = ["tools/concepts.py", "count", "--bank", str(bank), "--data", spec, "--out"]
    train, test = (spec.replace("{000..011}", part) for part in ("{000..009}", "{010..011}"))
    tune = ["tools/tune.py", "--model", str(model), "--target", "kind", "--train", train]
    tune += ["--test", f"held-out={test}", "--methods", "linear", "mlp", "--seeds", "2"]
    tune += ["--views", "2", "--out"]
    draw = random.Random(3)
    for name, arguments in (("count", count), ("tune", tune)):
        whole, out = tmp_path / f"{name} whole", tmp_path / name
        finished([*launched("torchrun", 2), *arguments, str(whole)])
        for _ in range(2):
            command = [*launched("torchrun", 2), *arguments, str(out)]
            most = max(2, len(files_of(whole)) - 1)
            killed(command, out, draw=draw, most=most)
        finished([*launched("torchrun", 2), *arguments, str(out)])
        assert files_of(out) == files_of(whole), name
