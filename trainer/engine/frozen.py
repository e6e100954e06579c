"""Models that only run, larger than one device: their blocks come from all ranks, one by one."""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import nn

import trainer.engine.lean_import  # noqa: F401
from trainer.comm import Comm
from trainer.engine.blocks import gather_whole_blocks
from trainer.engine.zero_file import for_frozen


class FrozenEngine:
    """A model that only runs, its weights dealt to the ranks: ZeRO-3 without an optimizer.

    A pass gathers one block after another from all ranks, so all ranks take equally many. Before
    each they tell who has something to run; those that have not run along.
    """

    def __init__(self, model: nn.Module, comm: Comm) -> None:
        self.comm = comm
        config = for_frozen(next(model.parameters()).dtype)
        gather_whole_blocks(model)
        # Dealt before DeepSpeed would move the model to a device where it does not fit as a whole.
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(comm.device)
        self._engine, *_ = deepspeed.initialize(
            model=model, config=config, dist_init_required=False
        )
        self._engine.eval()

    def __call__(self, **inputs: Any) -> Any:
        self.comm.any(True)
        return self._engine(**inputs)

    def together(self, **inputs: Any) -> Any:
        """A pass that all ranks take at this point anyway, so that nobody has to be told."""
        return self._engine(**inputs)

    def stand_by(self, **spare: Any) -> None:
        """Run along on `spare` until no rank has anything to run."""
        while self.comm.any(False):
            self._engine(**spare)
