"""DeepSpeed as it is imported here: without what it would compile, load or warn of for nothing."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import deepspeed

# DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed, once a bucket.
warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)


# Without a GPU DeepSpeed would compile an op at the first launch, for minutes, and a build that is
# killed leaves a lock for which every later launch waits forever. Only inference uses that op.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _read_muon_uncompiled() -> None:
    """Import DeepSpeed's file of the optimizer Muon without torch's compiler.

    Each optimizer is asked whether it is Muon, and that file would bring the whole compiler along
    for its decorators: four seconds of every start. No run here has Muon.
    """
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    kept, compiler.compile = compiler.compile, lambda: lambda function: function
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    compiler.compile = kept


_read_muon_uncompiled()
