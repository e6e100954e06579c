"""What the ranks of the checkpoint tests do; imports little, because processes start often."""

from __future__ import annotations

import functools
import os
import random
import resource
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import manifest
from trainer.checkpoint.beside import SavesBeside
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.restored import Restored
from trainer.comm import Comm
from trainer.errors import CheckpointError

NAMES = {
    "weights": [f"block.{k}.weight" for k in range(5)],
    "moments": [f"{k}/exp_avg" for k in range(3)],
}


def content(step: int, group: str, name: str) -> Tensor:
    """The tensor of this name that belongs to this step."""
    seed = step * 1000 + sum(map(ord, group + name))
    return torch.randn(3, 17, generator=torch.Generator().manual_seed(seed))


def share(step: int, rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    return {
        group: {name: content(step, group, name) for name in names[rank::world_size]}
        for group, names in NAMES.items()
    }


def save(checkpoints: Checkpointer | SavesBeside, comm: Comm, step: int) -> Any:
    tensors = share(step, comm.rank, comm.world_size)
    return checkpoints.save(step, tensors, {"step": step}, {"run.yaml": f"steps: {step}\n"})


def wrongs(restored: Restored) -> list[str]:
    """Everything in a checkpoint that isn't what was saved for its step."""
    wrong = [] if restored.state == {"step": restored.step} else ["state"]
    wrong += [] if restored.texts == {"run.yaml": f"steps: {restored.step}\n"} else ["text"]
    for group, names in NAMES.items():
        tensors = dict(restored.tensors(group))
        if sorted(tensors) != sorted(names) or sorted(restored.names(group)) != sorted(names):
            wrong.append(f"names of {group}")
        for name, tensor in tensors.items():
            if not torch.equal(tensor, content(restored.step, group, name)):
                wrong.append(f"{group}/{name}")
    return wrong


def solo(folder: Path, *, keep: int = 2) -> Checkpointer:
    return Checkpointer(folder, Comm.solo(), keep=keep)


def latest_step(folder: Path) -> int:
    """Step of the newest checkpoint after checking its content; 0 where there is none."""
    warnings: list[str] = []
    restored = solo(folder).latest(warn=warnings.append)
    assert not warnings, warnings
    if restored is None:
        return 0
    assert not wrongs(restored), wrongs(restored)
    return restored.step


# -- on ranks -----------------------------------------------------------------------------------


def save_three(comm: Comm, folder: Path) -> list[str]:
    checkpoints = Checkpointer(folder, comm)
    return [save(checkpoints, comm, step).name for step in (10, 20, 30)]


def read_latest(comm: Comm, folder: Path) -> tuple[int, list[str], list[str]]:
    warnings: list[str] = []
    restored = Checkpointer(folder, comm).latest(warn=warnings.append)
    assert restored is not None
    return restored.step, wrongs(restored), warnings


def gathered(comm: Comm, count: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors made by a collective each, in one buffer; every rank keeps every other one."""
    buffer = torch.empty(500)
    for number in range(count):
        buffer.fill_(float(number))
        buffer.copy_(comm.sum(buffer) / comm.world_size)
        if number % comm.world_size == comm.rank:
            yield f"tensor-{number}", buffer


def limit_file_size(limit: int) -> None:
    """From here on larger files fail to be written (EFBIG), as on a full disk; -1 lifts it."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def saves_beside(comm: Comm, folder: Path) -> dict[str, Any]:
    """The disk answers when it is told to; tensors change as soon as `save` has returned."""
    gate, write = threading.Event(), manifest.write_durably
    manifest.write_durably = lambda path, data: (gate.wait(60), write(path, data))
    checkpoints = SavesBeside(Checkpointer(folder, comm), waits=False)
    found: dict[str, Any] = {}
    kept = {"live": torch.full((3,), 1.0)} if comm.rank else {}
    checkpoints.save(1, {"weights": list(kept.items())}, {}, {})
    for value in kept.values():
        value.fill_(2.0)
    found["waited for the disk"] = bool(list(folder.glob("step-*")))
    comm.barrier()
    gate.set()
    checkpoints.save(2, {"weights": kept}, {}, {})
    found["before the second"] = sorted(path.name for path in folder.glob("step-*"))[:1]
    checkpoints.finish()
    restored = Checkpointer(folder, comm).latest()
    assert restored is not None
    found["values"] = [restored.step, restored.tensor("weights", "live").tolist()]
    found["emptied"] = kept == {}
    if comm.rank:
        limit_file_size(100)
    for step in (3, 4):
        big = {"weights": {f"big-{comm.rank}": torch.zeros(1000)}}
        try:
            checkpoints.save(step, big, {}, {})
        except CheckpointError as error:
            found["told"] = str(error)
            limit_file_size(-1)
    try:
        checkpoints.finish()
    except CheckpointError as error:
        found["at the end"] = str(error)
    limit_file_size(-1)
    manifest.write_durably = write
    found["left"] = sorted(os.listdir(folder))
    return found


def failing_saves(comm: Comm, folder: Path) -> dict[str, Any]:
    """Files can't grow on rank 1, then on rank 0 (whose manifest is what fails)."""
    checkpoints, errors = Checkpointer(folder, comm, file_bytes=5000), []
    save(checkpoints, comm, 1)
    listing = sorted(os.listdir(folder))
    comm.barrier()
    for broken, limit in ((1, 3000), (0, 1500)):
        if comm.rank == broken:
            limit_file_size(limit)
        tensors = {"streamed": gathered(comm, 25)} if broken == 1 else {}
        many = {f"n{k}": torch.zeros(1) for k in range(40)} if comm.rank == 1 else {}
        try:
            checkpoints.save(2, {**tensors, "many": many}, {}, {})
        except CheckpointError as error:
            errors.append(str(error))
        limit_file_size(-1)
        comm.barrier()
        listing = [*listing, "|", *sorted(os.listdir(folder))]
        comm.barrier()
    checkpoints.save(2, {"streamed": gathered(comm, 25)}, {}, {})
    restored = checkpoints.latest()
    assert restored is not None
    files = {entry.name: entry.size for entry in restored.manifest.files}
    values = {name: tensor.unique().tolist() for name, tensor in restored.tensors("streamed")}
    return {"errors": errors, "listing": listing, "files": files, "values": values}


def misuses(comm: Comm, folder: Path) -> list[str]:
    """A name on two ranks, a name twice on one rank, a folder that can't be made."""
    errors = []
    twice = [("a", torch.zeros(1)), ("a", torch.ones(1))] if comm.rank == 0 else []
    for tensors in ({"weights": {"same.name": torch.zeros(2)}}, {"weights": twice}):
        try:
            Checkpointer(folder, comm).save(1, tensors, {}, {})
        except ValueError as error:
            errors.append(str(error))
    comm.barrier()
    errors.append(" ".join(sorted(os.listdir(folder))))
    (folder.parent / "a-file").touch()
    try:
        Checkpointer(folder.parent / "a-file" / "checkpoints", comm).save(1, {}, {}, {})
    except CheckpointError as error:
        errors.append(str(error))
    return errors


# -- killed -------------------------------------------------------------------------------------


def forked(work: Callable[[], None]) -> int:
    """Start a copy of this process that does `work` and ends."""
    process = os.fork()
    if process:
        return process
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def kill_at_random(folder: Path, kills: int, seed: int, beside: bool) -> dict[str, int]:
    """Two ranks save in a loop; one of them is killed at a random moment; again and again."""
    draw, torn, steps = random.Random(seed), 0, 0
    for _ in range(kills):
        reported = saved_and_killed(folder, draw, beside)
        torn += bool(list(folder.glob(".saving-*")))
        found = latest_step(folder)
        assert found - reported in range(2 + beside), f"{found} after {reported} had been committed"
        steps = found
    return {"torn": torn, "steps": steps}


def saved_and_killed(folder: Path, draw: random.Random, beside: bool) -> int:
    """The last step that rank 0 was told is safe."""
    start, port = latest_step(folder), free_port()
    reader, writer = os.pipe()
    ranks = [
        forked(lambda rank=rank: save_on(rank, port, folder, start, writer, beside))
        for rank in (0, 1)
    ]
    os.close(writer)
    reports = os.read(reader, 1)
    # Rank 0 reports every save; wait for a few, then a part of one.
    for _ in range(draw.randrange(3)):
        reports += os.read(reader, 1)
    signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 0.03))
    signal.sigwait([signal.SIGALRM])
    os.kill(ranks[draw.randrange(2)], signal.SIGKILL)
    while more := os.read(reader, 4096):  # ends when both ranks have
        reports += more
    os.close(reader)
    for rank in ranks:
        os.waitpid(rank, 0)
    return start + len(reports) - 1


def save_on(rank: int, port: int, folder: Path, start: int, reports: int, beside: bool) -> None:
    """One report when the ranks have met, then one for each save, or each that a next one beside
    training has waited for."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # gloo tells of the dead neighbour at length
    comm = Comm.from_environment(timeout_seconds=20.0)
    checkpoints, step = Checkpointer(folder, comm), start
    if beside:
        checkpoints = SavesBeside(checkpoints, waits=False)
        step += 1
        save(checkpoints, comm, step)
    while True:
        if rank == 0:
            os.write(reports, b".")
        step += 1
        save(checkpoints, comm, step)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def kill_before_every_operation(folder: Path) -> dict[str, Any]:
    """Steps 1 and 2 are there; saving 3 is killed before its k-th file operation, for every k."""
    outcomes: list[list[int]] = []
    for step in (1, 2):
        save(solo(folder / "start"), Comm.solo(), step)
    for operation in range(1000):
        place = folder / str(operation)
        shutil.copytree(folder / "start", place)
        process = forked(functools.partial(save_killed, place, operation))
        _, status = os.waitpid(process, 0)
        outcomes.append(sound_steps(place))
        save(solo(place), Comm.solo(), 4)
        assert not [name for name in os.listdir(place) if name.startswith(".")]
        assert latest_step(place) == 4
        if not os.WIFSIGNALED(status):
            return {"status": status, "outcomes": outcomes}
    raise AssertionError("the save never came to its end")


def save_killed(folder: Path, kill_before: int) -> None:
    """Python announces every opening, renaming, making and removing to its audit hooks."""
    operations = 0

    def audit(event: str, arguments: Any) -> None:
        nonlocal operations
        if event in FILE_OPERATIONS:
            if operations == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            operations += 1

    checkpoints = solo(folder)
    sys.addaudithook(audit)
    save(checkpoints, Comm.solo(), 3)
    os._exit(0)


def sound_steps(folder: Path) -> list[int]:
    """All steps whose checkpoint verifies, by hiding the newest again and again."""
    steps = []
    while step := latest_step(folder):
        steps.append(step)
        (folder / f"step-{step:08d}").rename(folder / f"hidden-{step}")
    for step in steps:
        (folder / f"hidden-{step}").rename(folder / f"step-{step:08d}")
    return steps


def in_launcher(pipe: Any, function: Callable[..., Any], *arguments: Any) -> None:
    """Runs in a process without threads, so that it may fork."""
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
