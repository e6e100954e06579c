"""A DeepSpeed file that somebody brings is honoured, or refused in one sentence that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.comm import Comm
from trainer.config import OptimConfig
from trainer.engine.zero_file import Decided, completed
from trainer.errors import ConfigError

OPTIM = OptimConfig(learning_rate=3e-4, clip_norm=2.0, weight_decay=0.1)
ZERO1 = {"zero_optimization": {"stage": 1}}
ENABLED: dict[str, Any] = {"enabled": True}


def read(folder: Path, content: Any) -> dict[str, Any]:
    path = folder / "brought.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return completed(path, Comm.solo(), Decided(4, 2, OPTIM))


HONOURED = {
    "nothing": ({}, {"zero_optimization": {"stage": 0}}),
    "only bf16": ({"bf16": {"enabled": False}}, {"zero_optimization": {"stage": 0}}),
    "old name": ({"bfloat16": ENABLED}, {"bf16": ENABLED}),
    "no stage": ({"zero_optimization": {"overlap_comm": False}}, None),
    "stage as text": ({"zero_optimization": {"stage": "2"}}, {"zero_optimization": {"stage": 2}}),
    "old style": ({"zero_optimization": True}, ZERO1),
    "old style off": ({"zero_optimization": False}, {"zero_optimization": {"stage": 0}}),
    "auto bf16": ({"bf16": {"enabled": "auto"}}, {"bf16": {"enabled": False}}),
    "auto buckets": (
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "sub_group_size": "auto"}},
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": 50_000_000}},
    ),
    "the run's numbers": (
        ZERO1
        | {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 2.0}
        | {"gradient_accumulation_steps": 2},
        ZERO1 | {"gradient_accumulation_steps": 1, "gradient_clipping": 2.0},
    ),
    "all auto": (
        ZERO1
        | dict.fromkeys(("train_batch_size", "gradient_clipping", "steps_per_print"), "auto")
        | {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}}
        | {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}},
        ZERO1 | {"bf16": {"enabled": False}, "gradient_clipping": 2.0},
    ),
    "the run's optimizer": (
        {"optimizer": {"type": "adamw", "params": {"lr": 3e-4, "torch_adam": True}}},
        None,
    ),
    "what is off": (
        {"tensorboard": {"enabled": False}, "fp16": {"enabled": False, "loss_scale": 0}}
        | {"flops_profiler": {"enabled": False}, "amp": {"enabled": False}},
        None,
    ),
    "no offload": ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, None),
    "a mark": ("\ufeff{}", None),
    "never prints": ('{"steps_per_print": Infinity}', {"steps_per_print": float("inf")}),
}


@pytest.mark.parametrize("name", HONOURED)
def test_a_file_that_can_be_honoured_becomes_what_the_run_does(tmp_path: Path, name: str) -> None:
    content, expected = HONOURED[name]
    config = read(tmp_path, content)
    assert config["train_micro_batch_size_per_gpu"] == 4
    for key, value in (expected or {}).items():
        assert config[key] == value
    assert not {"optimizer", "fp16", "tensorboard", "amp", "train_batch_size"} & set(config)


def zero(stage: int = 3, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


REFUSED: list[tuple[Any, str]] = [
    ([], "must be a mapping"),
    ("", "is not JSON"),
    ("{'a': 1}", "is not JSON.*line 1 column 2"),
    ('{"bf16": {} // why\n}', "is not JSON.*line 1"),
    ('{"bf16": {}, "bf16": {}}', "'bf16' stands twice"),
    ('{"gradient_clipping": NaN}', "gradient_clipping is nan"),
    ("[" * 100_000, "is not JSON"),
    (zero(4), "stage is 4; it must be 0, 1, 2 or 3"),
    (zero(True), "stage is True"),
    (zero(2, overlap_com=True), "overlap_com: there is no such key; did you mean 'overlap_comm'"),
    (zero(2, reduce_bucket_size="big"), "reduce_bucket_size: .*found 'big'"),
    (zero(2, reduce_bucket_size=-1), "reduce_bucket_size"),
    (zero(offload_optimizer={"device": "nvme"}), 'device is "nvme".*use "cpu"'),
    (zero(offload_param={"device": "nvme", "nvme_path": "/x"}), 'device is "nvme"'),
    (zero(2, offload_param={"device": "cpu"}), "offload_param needs stage 3 at least, found 2"),
    (zero(0, offload_optimizer={"device": "cpu"}), "offload_optimizer needs stage 1"),
    (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload of everything"),
    (zero(2, cpu_offload=True), "old spelling"),
    (zero(zero_quantized_weights=True), "zero_quantized_weights needs a GPU"),
    (zero(2, zero_quantized_gradients=True), "zero_quantized_gradients needs stage 3"),
    (zero(zero_hpz_partition_size=2), "zero_hpz_partition_size needs a GPU"),
    (zero(mics_shard_size=2), "mics_shard_size"),
    (zero(1, compute_grad_norm=False), "compute_grad_norm must be true"),
    ({"bf16": True}, 'bf16 is True, not a section; write "bf16": {"enabled": true}'),
    ({"zero_optimization": 2}, 'not a section; write "zero_optimization": {"stage": 1}'),
    ({"bf16": {"enabled": "yes"}}, "bf16.enabled is 'yes'; write true, false or auto"),
    ({"bf16": {"enabled": True, "loss_scale": 1}}, "bf16: loss_scale: there is no such key"),
    ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "check_grad_overflow must be"),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, "kept in float32"),
    ({"train_batch_size": 32}, "train_batch_size to 32, and the run has 8 .global_batch."),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps to 4, and the run has 2"),
    ({"gradient_clipping": 1.0}, "gradient_clipping to 1.0, and the run has 2.0 .optim.clip_norm"),
    ({"optimizer": {"type": "Muon", "params": {"lr": 0.02}}}, "type 'Muon', and a run moves"),
    ({"optimizer": {"type": "Lamb"}}, "optimizer has type 'Lamb'.*optim: AdamW"),
    ({"optimizer": {"params": {"lr": 0.5}}}, "optimizer has lr 0.5.*learning_rate 0.0003"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler can't be used.*optim.warmup_steps"),
    ({"tensorboard": ENABLED}, "tensorboard can't be used.*metrics.jsonl"),
    ({"wandb": ENABLED}, "wandb can't be used"),
    ({"csv_monitor": ENABLED}, "csv_monitor can't be used"),
    ({"flops_profiler": ENABLED}, "flops_profiler can't be used.*plan"),
    ({"comms_logger": ENABLED}, "comms_logger can't be used"),
    ({"activation_checkpointing": {"partition_activations": True}}, "gradient_checkpointing"),
    ({"autotuning": ENABLED}, "autotuning can't be used"),
    ({"data_efficiency": ENABLED}, "data_efficiency can't be used"),
    ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention can't be used.*dropped"),
    ({"compression_training": {"x": 1}}, "compression_training can't be used.*dropped"),
    ({"pipeline": {"stages": 2}}, "pipeline can't be used.*ZeRO alone"),
    ({"elasticity": ENABLED}, "elasticity can't be used"),
    ({"data_types": {"grad_accum_dtype": "fp32"}}, "data_types can't be used"),
    ({"prescale_gradients": True}, "prescale_gradients is True.*always has False"),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is 'sum'"),
    ({"zero_optimisation": {"stage": 2}}, "no 'zero_optimisation'; did you mean 'zero_optim"),
    ({"communication_data_type": "fp8"}, "DeepSpeed can't use it.*communication_data_type"),
    ({"torch_autocast": {"enabled": True, "dtype": "int4"}}, "DeepSpeed can't use it: 'int4'"),
    ({"steps_per_print": "often"}, "steps_per_print is 'often'; it must be int or float"),
    ({"no_such_thing": 1}, "DeepSpeed has no 'no_such_thing'"),
]


@pytest.mark.parametrize(("content", "sentence"), REFUSED, ids=[s for _, s in REFUSED])
def test_what_can_not_be_honoured_is_one_sentence_with_the_way_out(
    tmp_path: Path, content: Any, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        read(tmp_path, content)
    assert "brought.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read .*missing.json"):
        completed(tmp_path / "missing.json", Comm.solo(), Decided(1, 1, OPTIM))
    with pytest.raises(ConfigError, match=r"can't read"):
        completed(tmp_path, Comm.solo(), Decided(1, 1, OPTIM))
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"latin.json is not JSON"):
        completed(tmp_path / "latin.json", Comm.solo(), Decided(1, 1, OPTIM))
