"""Saving beside training: a step waits for the copy to host memory, and not for the disk.

The files are written, hashed and committed by a thread, by the same two phases as ever and with
collectives of a group of its own. A kill leaves the checkpoints before it as they were; what it
costs is the steps since the last that was committed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.errors import CheckpointError
from trainer.pulse import PULSE
from trainer.types import NamedTensors


class SavesBeside:
    """At most one save is under way; every rank calls every method, equally often.

    Where `waits` is true each save is on disk when `save` returns.
    """

    def __init__(self, checkpoints: Checkpointer, *, waits: bool) -> None:
        self._writer = checkpoints if waits else checkpoints.beside()
        self._waits = waits
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, NamedTensors],
        state: Mapping[str, Any],
        texts: Mapping[str, str],
    ) -> None:
        """Begin a save, once the one before has ended; the tensors may change when it returns.

        Where the one before failed, its CheckpointError is raised, on all ranks, after this one has
        begun.
        """
        if self._waits:
            self._writer.save(step, tensors, state, texts)
            return
        copied = {group: _copied(values) for group, values in tensors.items()}
        before = self._ended()
        arguments = (step, copied, dict(state), dict(texts))
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()
        if before is not None:
            raise before

    def finish(self) -> None:
        """Wait until what was begun is on disk; CheckpointError on all ranks where it failed."""
        if (failure := self._ended()) is not None:
            raise failure

    def _ended(self) -> BaseException | None:
        if self._thread is not None:
            with PULSE.phase("save"):
                self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        if failure is not None and not isinstance(failure, CheckpointError):
            raise failure
        return failure

    def _write(self, *arguments: Any) -> None:
        try:
            self._writer.save(*arguments)
        except BaseException as error:
            self._failure = error


def _copied(values: NamedTensors) -> list[tuple[str, Tensor]]:
    """On the host, sharing memory with nothing. A dict is emptied on the way, so that no tensor is
    held twice."""
    if isinstance(values, dict):
        return [(name, _on_host(values.pop(name))) for name in list(values)]
    pairs = values.items() if isinstance(values, Mapping) else values
    return [(name, _on_host(tensor)) for name, tensor in pairs]


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
