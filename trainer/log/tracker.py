"""The same numbers on Weights & Biases, where a run asks for it by its key `wandb`.

The package is optional and imported here alone. Who you are it finds out by itself (`wandb login`,
WANDB_API_KEY); nothing of that passes through a run file. WANDB_MODE=offline writes to
WORKDIR/wandb, for `wandb sync`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from trainer.addresses import all_without_secrets
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.errors import ConfigError

STEP = "step"


class WeightsAndBiases:
    """One run of a project; it is gone on with when a workdir is."""

    def __init__(self, project: str, workdir: Path, settings: Mapping[str, Any]) -> None:
        """ConfigError where the package is missing or does not let us in."""
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(f"wandb: {project} needs it: pip install wandb ({error})") from error
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project,
                id=run_name(workdir),
                name=workdir.name,
                dir=str(workdir),
                resume="allow",
                config=dict(settings),
                settings=wandb.Settings(console="off", silent=True, save_code=False),
            )
        except Exception as error:  # its own errors, and those of its network
            why = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"wandb: {project} can't be logged to: {why}; run `wandb login`, or set "
                "WANDB_MODE=offline, or drop the key"
            ) from error
        # A resume takes steps again that were sent already; its own counter would refuse them.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, STEP: step})

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "height width 3"]) -> None:
        self._run.log({name: self._wandb.Image(pixels), STEP: step})

    def close(self) -> None:
        self._run.finish()


def tracker_for(config: RunConfig, comm: Comm) -> WeightsAndBiases | None:
    """Rank 0's, where the run asks for one."""
    if config.wandb is None or not comm.is_main:
        return None
    settings = config.model_dump(mode="json")
    return WeightsAndBiases(config.wandb, config.workdir, all_without_secrets(settings))


def run_name(workdir: Path) -> str:
    """The same for every start of a run: a hash of its workdir, and of who made it when."""
    place = workdir.resolve()
    made = place.stat().st_ino if place.exists() else 0
    return hashlib.blake2b(f"{place} {made}".encode(), digest_size=8).hexdigest()
