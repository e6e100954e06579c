"""The same damage done to three kinds of checkpoint: python -m tests.checkpoint.others FOLDER

Prints a line of JSON: of each kind, how often damage was noticed, and how often other numbers came
back without a word; and of a save that is killed, what was left.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from tests.test_launch import free_port
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm

TRIALS = 12
Save = Callable[[Path, int], None]
Load = Callable[[Path], dict[str, Tensor]]


def values(step: int, *, width: int = 1 << 18) -> dict[str, Tensor]:
    return {f"w{number}": torch.full((width,), float(step)) for number in range(6)}


def own_save(folder: Path, step: int) -> None:
    Checkpointer(folder, Comm.solo()).save(step, {"weights": values(step)}, {}, {})


def own_load(folder: Path) -> dict[str, Tensor]:
    restored = Checkpointer(folder, Comm.solo()).latest(warn=lambda line: None)
    assert restored is not None
    return dict(restored.tensors("weights"))


def dcp_save(folder: Path, step: int) -> None:
    dcp.save(values(step), checkpoint_id=str(folder / f"step-{step}"), no_dist=True)


def dcp_load(folder: Path) -> dict[str, Tensor]:
    """The newest folder: DCP itself knows of no latest one."""
    newest = max(folder.glob("step-*"), key=lambda path: int(path.name[5:]))
    state = {name: torch.full_like(value, -1.0) for name, value in values(0).items()}
    dcp.load(state, checkpoint_id=str(newest), no_dist=True)
    return state


class OfDeepSpeed:
    """An engine of one rank whose weights are the step's number."""

    def __init__(self) -> None:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.model = nn.ParameterDict({k: nn.Parameter(v) for k, v in values(0).items()})
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        settings = {"train_micro_batch_size_per_gpu": 1}
        self.engine = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=settings, dist_init_required=True
        )[0]

    def save(self, folder: Path, step: int) -> None:
        for parameter in self.model.values():
            parameter.data.fill_(float(step))
        self.engine.save_checkpoint(str(folder), tag=f"step-{step}")

    def load(self, folder: Path) -> dict[str, Tensor]:
        path, _ = self.engine.load_checkpoint(str(folder))
        if path is None:
            raise RuntimeError("nothing loaded")
        return {name: value.detach().clone() for name, value in self.model.items()}


def outcome(load: Load, folder: Path) -> str:
    """Of a folder with steps 1 and 2."""
    try:
        found = load(folder)
    except BaseException as error:  # that of DCP is no Exception
        return f"error ({type(error).__name__})"
    steps = {float(value) for tensor in found.values() for value in tensor.unique()}
    return {(2.0,): "the newest", (1.0,): "the one before"}.get(tuple(steps), "OTHER NUMBERS")


def damaged(kind: str, folder: Path, draw: random.Random) -> None:
    """The largest file of the newest step."""
    newest = max((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime_ns)
    path = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    if kind == "a byte changed":
        content[draw.randrange(len(content))] ^= 0xFF
    elif kind == "cut":
        content = content[: draw.randrange(len(content))]
    path.write_bytes(content)
    if kind == "gone":
        path.unlink()


def killed(save: Save, folder: Path, draw: random.Random) -> None:
    """A process that saves step 2 ends in the middle, somewhere."""
    process = os.fork()
    if not process:
        save(folder, 2)
        os._exit(0)
    time.sleep(draw.uniform(0.0, 0.12))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    draw, told = random.Random(0), dict[str, dict[str, Counter[str]]]()
    kinds: dict[str, tuple[Save, Load]] = {"own": (own_save, own_load), "dcp": (dcp_save, dcp_load)}
    for name in ("own", "dcp", "deepspeed"):
        if name == "deepspeed":
            engine = OfDeepSpeed()
            kinds[name] = (engine.save, engine.load)
        save, load = kinds[name]
        for kind in ("killed", "a byte changed", "cut", "gone"):
            if (name, kind) == ("deepspeed", "killed"):
                continue  # a process with a group can't be copied
            for _ in range(1 if kind == "gone" else TRIALS):
                folder = out / "tried"
                shutil.rmtree(folder, ignore_errors=True)
                save(folder, 1)
                if kind == "killed":
                    killed(save, folder, draw)
                else:
                    save(folder, 2)
                    damaged(kind, folder, draw)
                found = told.setdefault(name, {}).setdefault(kind, Counter())
                found[outcome(load, folder)] += 1
    sys.stdout.write(f"\n{json.dumps(told)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
