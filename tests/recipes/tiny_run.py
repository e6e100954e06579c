"""A run of any recipe with tiny towers, of a few pictures that are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config import RunConfig, parse_run

RUN = """
workdir: {folder}/run
steps: 4
global_batch: 8
micro_batch: 2
deepspeed: ds_configs/zero3.json
recipe:
  name: clip
{keys}
  model:
    image_size: 32
    patch_size: 16
    text_length: 12
    embed_dim: 16
    image: {{width: 32, layers: 1, heads: 2}}
    text: {{width: 32, layers: 1, heads: 2}}
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.003}}
log_every: 1 steps
save_every: 2 steps
"""


def tiny_run(folder: Path, name: str, spec: str, *overrides: str, keys: str = "") -> RunConfig:
    """`keys`: lines of the recipe's section beside its model. The run's folder is `name`."""
    indented = "".join(f"  {line}\n" for line in keys.strip().splitlines())
    text = RUN.format(folder=folder, spec=spec, keys=indented)
    return parse_run(text, [f"workdir={folder}/{name}", *overrides])


PROTOCLIP: Any = (
    "recipe.name=protoclip",
    *("recipe.episode_samples=16", "recipe.clusters=4", "recipe.warmup_episodes=0"),
    "recipe.model.head={dim: 8, layers: 1}",
)
"""What makes a run of ProtoCLIP of it, with an episode from the first step on."""
