"""A list of tasks, worked on ahead of their use by reader processes; results come in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.data.workers import loader_options, why_no_batch
from trainer.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int
) -> Iterator[Result]:
    """`work` of each task; by `workers` processes, to each of which `work` is sent once, or here.

    The results do not depend on it. `work` should raise nothing: an error of a process has lost its
    kind. DataError where the processes are gone.
    """
    if not workers:
        yield from map(work, tasks)
        return
    loader: DataLoader[Any] = DataLoader(
        _Worked(work),
        batch_size=None,
        sampler=tasks,
        generator=torch.Generator(),  # the run's own would have drawn once more
        **loader_options(workers, preload="trainer.data.feed"),
    )
    results: Any = iter(loader)
    try:
        yield from results
    except RuntimeError as error:
        raise DataError(why_no_batch(error)) from error
    finally:
        results._shutdown_workers()


class _Worked(Dataset[Any]):
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def __getitem__(self, task: Any) -> Any:
        return self.work(task)
