"""Runs that are tried on a pretended GPU: a small one of each recipe, and what they read."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.fixtures.emoji import write_shards
from tests.fixtures.vectors import write_vectors
from tests.models import folders
from tests.recipes.test_lexvla import save_language_model
from tests.recipes.test_live_teacher import pair
from trainer.config import RunConfig, parse_run
from trainer.data.labels import ClusterLabels
from trainer.data.shards import ShardSet

TOWER = "{width: 32, layers: 1, heads: 2}"
IMAGES = f"image_size: 32, patch_size: 16, embed_dim: 16, image: {TOWER}"
TEXTS = f"text_length: 8, vocabulary: 300, text: {TOWER}"
PAIR = f"model: {{{IMAGES}, {TEXTS}}}"
ALONE = f"model: {{{IMAGES}}}"
HEAD = "head: {hidden: 24, dim: 8, norm: batch}"
LABELS = "labels: FOLDER/labels"
RECIPES = {
    "clip": PAIR,
    "siglip": PAIR,
    "protoclip": (
        f"episode_samples: 40, clusters: 5, model: {{{IMAGES}, {TEXTS}, "
        f"head: {{hidden: 24, dim: 8, norm: batch}}}}"
    ),
    "mlcd": f"{LABELS}, head: {{sample_rate: 0.5}}, {ALONE}",
    "slots": (
        f"loss: slots, negatives: each, {LABELS}, "
        f"head: {{sample_rate: 0.5, rows: bfloat16}}, {ALONE}"
    ),
    "partial_fc": f"{LABELS}, head: {{sample_rate: 0.5, clip_norm: 1.0}}, {ALONE}",
    "unicom": f"{LABELS}, features_kept: 8, head: {{sample_rate: 1.0, logq: true}}, {ALONE}",
    "rice": f"{LABELS}, head: {{sampling: blocks, optimizer: sgd}}, {ALONE}",
    "palm": (
        "classes: subgroup, prototypes_per_class: 3, kept: 2, "
        f"model: {{{IMAGES}, head: {{hidden: 24, dim: 8, norm: layer}}}}"
    ),
    "supcon": f"classes: subgroup, model: {{{IMAGES}, head: {{hidden: 24, dim: 8}}}}",
    "flame": (
        "store: FOLDER/vectors, head_hidden: 24, "
        "model: {image_size: 32, patch_size: 16, embed_dim: 8, "
        "image: {width: 32, layers: 1, heads: 2}}"
    ),
    "aclip": (
        f"simclr: {{head: {{layers: 1, hidden: 24, dim: 8}}}}, byol: {{head: {{hidden: 24, "
        f"dim: 8}}}}, model: {{{IMAGES.replace('patch_size: 16', 'patch_size: 8')}, {TEXTS}}}"
    ),
    "superclip": PAIR,
    "superclass": f"captions: {{length: 8, vocabulary: 300}}, {ALONE}",
    "codebook": (
        "captions: {length: 8, vocabulary: 300}, codes: {count: 12}, "
        f"decoder: {{width: 16, layers: 1, heads: 2}}, {ALONE}"
    ),
    "tinyclip": (
        "distill: {model: FOLDER/pair}, "
        "gates: {stages: [{steps: 1, target: 0.3, settle: 1}, {steps: 2, target: 0.6}]}, "
        "model: {image_size: 32, patch_size: 16, text_length: 12, embed_dim: 24, "
        "tokenizer: FOLDER/pair, image: {width: 32, layers: 2, heads: 4}, "
        "text: {width: 32, layers: 2, heads: 4}}"
    ),
    "lexvla": (
        "adapter: {heads: 2, hidden: 32, out_hidden: 24}, penalty_steps: 2, "
        "prompt: 'words of \"{}\":', model: {image_size: 32, patch_size: 16, text_length: 32, "
        "embed_dim: 16, image: {width: 32, layers: 2, heads: 2, trained: false}, "
        "text: {path: FOLDER/lm, lora: {rank: 2, alpha: 4}}}"
    ),
    "distilled": (
        "distill: {image_store: FOLDER/images, text_store: FOLDER/texts}, "
        f"prototypes: {{classes: [subgroup], head: {{sample_rate: 0.5}}}}, {PAIR}"
    ),
}
"""The settings of each; `FOLDER` is where `prepare` has written."""
SPELT = {"slots": "mlcd", "distilled": "clip"}
"""Recipes whose case has another name."""
RUN = """
workdir: {folder}/{case}
steps: {steps}
global_batch: {batch}
micro_batch: 4
deepspeed: {folder}/zero0.json
gradient_checkpointing: {checkpointing}
recipe: {{name: {name}, {recipe}}}
data: {{train: "{spec}", workers: 0}}
log_every: 100 steps
save_every: never
"""


def config_of(
    case: str, folder: Path, spec: str, world_size: int, *overrides: str, steps: int = 4
) -> RunConfig:
    """`case` is a recipe, or a recipe and `/2` for two micro-batches."""
    name, _, passes = case.partition("/")
    text = RUN.format(
        folder=folder,
        case=case.replace("/", "-"),
        steps=steps,
        batch=4 * world_size * int(passes or 1),
        checkpointing=str(passes != "").lower(),
        name=SPELT.get(name, name),
        recipe=RECIPES[name].replace("FOLDER", str(folder)),
        spec=spec,
    )
    return parse_run(text, overrides)


def prepare(folder: Path) -> str:
    """Shards, labels, vectors, models and a DeepSpeed file; the spec of the shards."""
    (folder / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    spec = write_shards(folder / "shards", count=40, per_shard=20)
    ids = torch.as_tensor(ShardSet.open(spec).ids)
    labels = torch.stack([torch.arange(len(ids)) % 300, torch.arange(len(ids)) % 7], dim=1)
    ClusterLabels(ids, labels).save(folder / "labels")
    write_vectors(folder / "vectors", spec, vectors=7)
    write_vectors(folder / "images", spec, field="images", model="a pair", pooling="projected")
    write_vectors(folder / "texts", spec, seed=1, model="a pair", pooling="projected")
    save_language_model(folder / "lm")
    pair(folder / "pair", folders.clip)
    return spec
