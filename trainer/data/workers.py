"""Reader processes that outlive neither their rank nor a signal that was meant for it.

Who asks a run to stop (a terminal, Slurm, `docker stop`) signals all its processes. The rank
finishes and saves, and needs its readers for that; so they, and the server that forks them, never
see these signals. They end when the rank does, whatever ends it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, popen_forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError

PREFETCH = 2
"""Micro-batches that a worker prepares ahead."""
TIMEOUT_SECONDS = 600
"""A rank waits so long for a batch of its workers."""
SHARED_MEMORY = Path("/dev/shm")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class _Popen(popen_forkserver.Popen):
    def terminate(self) -> None:
        """At the end of the rank; SIGTERM would not be heard."""
        self.kill()


class _Worker(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Popen(process_obj)


class _Context(ForkServerContext):
    Process = _Worker


def loader_options(workers: int, *, preload: str) -> dict[str, Any]:
    """Options of a DataLoader whose dataset gives whole batches; workers have `preload` ready."""
    if not workers:
        return {"collate_fn": _unchanged}
    # Not fork: the parent has threads. The server imports this module once, its children share it.
    context = _Context()
    context.set_forkserver_preload([preload])
    with _blocked():  # what these and the server's children inherit
        resource_tracker.ensure_running()
    with _blocked():  # once more: starting the tracker has unblocked two of them here
        forkserver.ensure_running()
    return {
        "collate_fn": _unchanged,
        "num_workers": workers,
        "multiprocessing_context": context,
        "persistent_workers": True,
        "prefetch_factor": PREFETCH,
        "timeout": TIMEOUT_SECONDS,
        "worker_init_fn": _begin,
    }


def refuse_small_shared_memory(workers: int, *, batch_bytes: int, ranks_here: int) -> None:
    """A ConfigError where batches on their way from the workers don't fit into /dev/shm.

    There they would wait for ever, or die of a bus error, without naming the reason.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    needed = batch_bytes * (workers * PREFETCH + 1) * ranks_here
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, and {ranks_here} ranks with "
            f"data.workers={workers} need about {needed / 2**20:.0f} MiB there; give the container "
            "more (docker run --shm-size=8g), or use fewer data.workers or a smaller micro_batch"
        )


def why_no_batch(error: RuntimeError) -> str:
    """A sentence for what a DataLoader raises when its workers are lost."""
    return (
        f"the data workers failed: {str(error).splitlines()[0] if str(error) else 'no reason'}; "
        f"a full {SHARED_MEMORY} does this (docker run --shm-size=8g), and so do samples that take "
        f"over {TIMEOUT_SECONDS} s to read, or too little memory; try fewer data.workers, or 0"
    )


def _begin(worker: int) -> None:
    """In the worker: deaf to signals, and gone with the rank."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank() -> None:
    """The server is this process's parent, so nobody else would tell that the rank has died."""
    rank = multiprocessing.parent_process()
    if rank is not None:
        rank.join()
        os._exit(1)


@contextmanager
def _blocked() -> Iterator[None]:
    """Signals that come meanwhile are delivered at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unchanged(batch: Any) -> Any:
    return batch
