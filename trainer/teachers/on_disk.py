"""What every teacher says of the folder it comes from, and where its weights go."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch

from trainer.data.corpus.wheels import sha256_of
from trainer.errors import ConfigError
from trainer.models.folder import folder_settings, settings_hash
from trainer.teachers.frozen import spread
from trainer.teachers.section import TeacherSpec


def weights_hash(folder: Path) -> str:
    """SHA-256 of a folder's safetensors; of their hashes where they are several."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"no safetensors in {folder}")
    hashes = [sha256_of(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def settings_of(folder: Path, **further: str) -> str:
    return settings_hash(folder_settings(folder, local_files_only=True), **further)


def took(began: float) -> str:
    return f"loaded and looked at in {time.perf_counter() - began:.1f} s"


def placed(spec: TeacherSpec, model: Any, device: torch.device | str) -> Any:
    model.requires_grad_(False)
    if spec.spread:
        return spread(model, layer=spec.layer, memory=spec.memory, offload=spec.offload)
    return model if spec.sharded else model.to(device)
