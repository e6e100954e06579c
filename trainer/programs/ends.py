"""Two ranks that meet, train a little, save beside it and end, again and again: how each ends.

An end is where threads of the group, of a save and of the interpreter let go of tensors. Each pair
forks off a process that has imported everything, and ends as the program does.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from trainer.checkpoint.beside import SavesBeside
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.command import run_command
from trainer.programs.faults import free_port

STEPS = 4
RANKS = 2
MOST_SECONDS = 300.0


def ends(count: int, *, say: Callable[[str], None]) -> Counter[str]:
    """How often each exit code, or signal, ended a rank of `count` pairs."""
    codes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            port = free_port()
            ranks = [_forked(rank, port, Path(folder, str(number))) for rank in range(RANKS)]
            found = [_end_of(process) for process in ranks]
            codes.update(found)
            if any(code != "0" for code in found) or (number + 1) % 50 == 0:
                say(f"{number + 1} of {count} pairs: {dict(codes)}")
    return codes


def _forked(rank: int, port: int, folder: Path) -> int:
    process = os.fork()
    if not process:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        _rank(folder)
    return process


def _rank(folder: Path) -> NoReturn:
    try:
        run_command(lambda: trained(Comm.from_environment(timeout_seconds=MOST_SECONDS), folder))
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
        os._exit(1)


def trained(comm: Comm, folder: Path) -> None:
    """A few steps of a small model, each saved while the next one is taken."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    saves = SavesBeside(Checkpointer(folder, comm), waits=False)
    for step in range(1, STEPS + 1):
        model(torch.randn(8, 16)).square().mean().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data -= 0.01 * comm.sum(parameter.grad) / comm.world_size
            parameter.grad = None
        share = dict(model.state_dict()) if comm.is_main else {}
        saves.save(step, {"weights": share}, {}, {})
    saves.finish()


def _end_of(process: int) -> str:
    until = time.monotonic() + MOST_SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return str(code) if code >= 0 else signal.Signals(-code).name
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return "none"
