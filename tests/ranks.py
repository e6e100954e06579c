"""Run a function on several gloo ranks, each a real process, with a hard time limit."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

# Ranks are forked off a process that has imported all this once: a launch costs half a second and
# not ten of each core. It starts no thread and no process group of its own.
PRELOADED = ("pytest", "trainer.loop", "trainer.recipes.protoclip", "tests.ranks")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 120.0
) -> list[Any]:
    """Call `function(comm, *arguments)` on every rank; the results in rank order.

    `function` must be importable (defined at the top of a module). A rank that fails or runs past
    the limit fails the test with that rank's traceback; no process is left behind.
    """
    port = free_port()
    ends = [_context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        _context.Process(
            target=_rank_main,
            args=(function, rank, world_size, port, ends[rank][1], arguments),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process, (_, sender) in zip(processes, ends, strict=True):
        process.start()
        sender.close()
    try:
        results = [_receive(ends[rank][0], rank, timeout_seconds) for rank in range(world_size)]
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
    return results


def _receive(pipe: Any, rank: int, timeout_seconds: float) -> Any:
    if not pipe.poll(timeout_seconds):
        raise TimeoutError(f"rank {rank} said nothing for {timeout_seconds} s")
    try:
        failed, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RuntimeError(f"rank {rank} died without a word") from None
    if failed:
        raise RuntimeError(f"rank {rank} failed:\n{value}")
    return value


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    pipe: Any,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        from trainer.comm import Comm

        comm = Comm.from_environment(timeout_seconds=60.0)
        # Bytes, not `send`: that would share a tensor's memory, which ends with this process.
        pipe.send_bytes(pickle.dumps((False, function(comm, *arguments))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((True, traceback.format_exc())))
    pipe.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
