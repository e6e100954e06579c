"""Plans against what is counted and measured in real steps, and of every large run file."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.small import small_batch, small_config, word_tokenizer
from trainer.comm import Comm
from trainer.config import OptimConfig, RunConfig, load_run
from trainer.engine.accumulate import accumulate
from trainer.engine.zero import Engine
from trainer.errors import ConfigError
from trainer.losses.contrastive import info_nce
from trainer.models.config import TowerConfig
from trainer.models.two_tower import build_two_tower
from trainer.plan.cards import card_of
from trainer.plan.plan import planned
from trainer.plan.told import plan_text, read_words
from trainer.plan.watching import Sent
from trainer.plan.zero_cost import Stage, weights_of
from trainer.types import Losses

ROOT = Path(__file__).parents[2]
LARGE = sorted(
    path
    for path in (ROOT / "launch/runs").glob("*.yaml")
    if any(word in path.name for word in ("laion", "datacomp", "yfcc", "cc3m", "cc12m"))
)


def run_file(name: str, *overrides: str) -> RunConfig:
    return load_run(ROOT / f"launch/runs/{name}.yaml", overrides)


@pytest.fixture
def as_launched(monkeypatch):
    """DeepSpeed asks for it, though nobody launched this process."""
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.mark.heavy
def test_planned_traffic_is_that_of_a_step_of_the_engine(as_launched):
    """To the byte, weights, gradients and the features of the loss; of every stage, with and
    without several micro-batches."""
    towers = {"width": 64, "layers": 3, "heads": 2}
    config = small_config(image=TowerConfig(**towers), text=TowerConfig(**towers))
    with Comm.imagined(4) as comm:

        def loss(features, batch):
            image, text, scale = map(features.tensor, ("image", "text", "logit_scale"))
            return Losses.of(clip=info_nce(image, text, scale, comm))

        for stage, count in itertools.product((0, 1, 2, 3), (1, 2)):
            file = ROOT / f"ds_configs/zero{stage}.json"
            model = build_two_tower(config, word_tokenizer(), seed=1)
            weights = weights_of(model, OptimConfig())
            engine = Engine(
                *(model, OptimConfig(), comm),
                deepspeed_config=file,
                micro_batch=3,
                accumulation=count,
            )
            batches = [small_batch(3) for _ in range(count)]

            for _ in range(2):
                accumulate(engine, loss, batches)
                engine.step(0.0)
            with Sent(at_least=9) as sent:  # flags of a step are smaller
                accumulate(engine, loss, batches)
                engine.step(0.0)
            read = Stage.read(json.loads(file.read_text()), world_size=4, width=4)
            expected = read.sent(weights, micro_batches=count)
            features = 2 * 4 * 3 * count * config.embed_dim * 4
            expected.update(all_gather=features, reduce_scatter=features)
            assert sent.bytes == expected


@pytest.mark.heavy
def test_planned_products_are_those_that_torch_counts():
    """Towers, heads and loss of a run against torch's counter; nothing is computed twice."""
    config = run_file(
        "quickstart",
        *("gradient_checkpointing=false", "recipe={name: clip, model: {preset: tiny}}"),
        "global_batch=12",
    )
    plan = planned(config, card=card_of("cpu"), world_size=1)
    model = build_two_tower(config.recipe.model, word_tokenizer(), seed=0)
    for tower in (model.image, model.text):
        tower.backbone.set_attn_implementation("eager")
    section = config.recipe.model
    batch = small_batch(12)._replace(
        images=torch.zeros(12, 3, section.image_size, section.image_size),
        tokens=torch.zeros(12, section.text_length, dtype=torch.int64),
        token_mask=torch.ones(12, section.text_length, dtype=torch.bool),
    )
    with FlopCounterMode(display=False) as counted:
        features = model(batch)
        image, text, scale = map(features.tensor, ("image", "text", "logit_scale"))
        info_nce(image, text, scale, Comm.solo()).backward()
    assert sum(plan.flops.values()) == counted.get_total_flops() == plan.model_flops


@pytest.mark.slow
def test_fewer_patches_more_views_and_prototypes_are_in_the_plan():
    base = ("global_batch=64", "micro_batch=null", "deepspeed=ds_configs/zero1.json")
    whole = run_file("clip", *base)
    half = run_file("clip", *base, "recipe.tokens={select: random, keep: 0.5}")
    plans = [planned(run, card=card_of("h100"), world_size=2) for run in (whole, half)]
    assert plans[1].flops["towers"] < 0.75 * plans[0].flops["towers"]
    rows = run_file(
        "mlcd_vitl14_laion",
        *("global_batch=512", "micro_batch=null", "recipe.model={preset: tiny}"),
    )
    plan = planned(rows, card=card_of("h100"), world_size=4)
    owned, dim = 250_000, 128
    assert plan.memory["heads and teachers"] == 3 * 4 * owned * dim
    touched = 25_000 + 512 * 8 // 4
    products = 2 * 512 * touched * dim
    assert 2.8 * products < plan.flops["prototypes"] < 4.2 * products, "logits made once or twice"
    episodes = planned(run_file("protoclip_vitb16_laion"), card=card_of("h100"), world_size=64)
    assert episodes.episode is not None
    assert episodes.episode.clustering_flops == 2 * 2 * 21 * 2_002_944 * 200_000 * 128 / 64


@pytest.mark.slow
@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_every_large_run_file_plans_on_64_cards_without_its_data(path):
    text = plan_text(load_run(path), ["world_size=64", "card=h100"])
    assert "fits:" in text
    assert "hours" in text or "min:" in text


RUN = """
workdir: {folder}/run
steps: 10
global_batch: 16
micro_batch: {micro}
deepspeed: {deepspeed}
gradient_checkpointing: {checkpointing}
recipe:
  name: clip
  model:
    preset: tiny
    text_length: 32
    vocabulary: 8192
    embed_dim: 256
    image_size: 64
    image: {{width: 512, layers: 6, heads: 8}}
    text: {{width: 512, layers: 6, heads: 8}}
data: {{train: none.tar}}
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize(
    ("stage", "size", "micro", "checkpointing"),
    [(1, 2, 8, False), (3, 2, 8, False), (3, 4, 2, True)],
)
def test_planned_memory_is_within_a_tenth_of_what_a_process_takes(
    tmp_path, stage, size, micro, checkpointing
):
    path = tmp_path / "run.yaml"
    zero = ROOT / f"ds_configs/zero{stage}.json"
    path.write_text(
        RUN.format(
            folder=tmp_path, micro=micro, deepspeed=zero, checkpointing=str(checkpointing).lower()
        )
    )
    plan = planned(load_run(path), card=card_of("cpu"), world_size=size)
    worker = Path(__file__).with_name("memory_worker.py")
    environment = {
        **os.environ,
        "LOCAL_RANK": "0",
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back to the system
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, worker, path, str(size), str(micro)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    print(f"planned {plan.total_bytes / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert plan.total_bytes == pytest.approx(measured, rel=0.1)


def test_words_that_are_none_are_told():
    assert read_words(["world_size=64", "card=a100", "samples=1_000"]).samples == 1000
    with pytest.raises(ConfigError, match="no card 'h1000' is known"):
        read_words(["card=h1000"])
    with pytest.raises(ConfigError, match="knows no 'gpus=3'"):
        read_words(["gpus=3"])
    with pytest.raises(ConfigError, match="world_size=0: write a number"):
        read_words(["world_size=0"])
    with pytest.raises(ConfigError, match="at most 1"):
        read_words(["utilisation=40"])
    with pytest.raises(ConfigError, match="not divisible by 3 ranks"):
        planned(run_file("clip"), card=card_of("h100"), world_size=3)
    unknown = run_file("clip", "recipe.model.image={path: models/unknown}")
    with pytest.raises(ConfigError, match=r"models/unknown is not here.*config\.json"):
        planned(unknown, card=card_of("h100"), world_size=8)
