"""What a DeepSpeed file may say to this program, and why not the rest.

Everything here is honoured by DeepSpeed or equals what the run does anyway; what would be read and
have no effect is refused by its name, with the place where the run decides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.errors import ConfigError
from trainer.settings.errors import did_you_mean

HONOURED: Mapping[str, tuple[type, ...]] = {
    "zero_optimization": (dict,),
    "bf16": (dict,),
    "torch_autocast": (dict,),
    "communication_data_type": (str, type(None)),
    "steps_per_print": (int, float),
    "wall_clock_breakdown": (bool,),
    "memory_breakdown": (bool,),
    "dump_state": (bool,),
    "disable_python_gc": (bool,),
    "log_level": (str,),
    "zero_allow_untested_optimizer": (bool,),
}
"""DeepSpeed reads these and does what they say; what each may be."""
ONLY: Mapping[str, Any] = {
    "managed_gradient_accumulation": False,
    "zero_force_ds_cpu_optimizer": False,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "disable_allgather": False,
    "sparse_gradients": False,
    "dataloader_drop_last": False,
}
"""These may say what the run does, and nothing else."""
_FIGURES = "the run writes its own figures (log_every, metrics.jsonl)"
_GONE = "DeepSpeed itself has dropped it"
_PARALLEL = "models are divided by ZeRO alone"
ELSEWHERE: Mapping[str, str] = {
    "scheduler": "the learning rate is the run's (optim.warmup_steps, then a cosine)",
    "tensorboard": _FIGURES,
    "wandb": _FIGURES,
    "csv_monitor": _FIGURES,
    "comet": _FIGURES,
    "flops_profiler": "it counts one pass of a step; --plan tells FLOPs, tools/bench.py seconds",
    "comms_logger": "nobody would ask for its summary; --plan tells the bytes of a step",
    "autotuning": "set micro_batch and the stage, and compare them with tools/bench.py",
    "activation_checkpointing": "the run decides it (gradient_checkpointing)",
    "data_efficiency": "the order of samples is the run's (data)",
    "data_types": "gradients have the type of the weights, and everything summed is float32",
    "checkpoint": "the run saves for any number of ranks (save_every, keep_checkpoints)",
    "aio": "nothing is kept on NVMe",
    "compile": "models are not compiled",
    "hybrid_engine": "it is for generating text",
    "timers": "tools/bench.py measures steps",
    "seq_parallel_communication_data_type": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "datastates": "the run saves for any number of ranks (save_every)",
    "weight_quantization": "models train in bfloat16 or float32",
    "amp": "it scales losses, and " + _GONE,
    "nebula": _GONE,
    "compression_training": _GONE,
    "quantize_training": _GONE,
    "eigenvalue": _GONE,
    "sparse_attention": _GONE,
    "elasticity": _GONE + "; any number of ranks goes on from a checkpoint",
    "graph_harvesting": _GONE,
    "curriculum_learning": _GONE,
    "progressive_layer_drop": _GONE,
}
"""These can't be used, and why."""
FROM_THE_RUN = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    "gradient_clipping",
)
"""The run decides these; the file may say the same, or `auto`."""
KNOWN = (*HONOURED, *FROM_THE_RUN, *ONLY, *ELSEWHERE, "optimizer", "fp16", "bfloat16")


def refuse_unusable(config: dict[str, Any], path: object) -> None:
    """ConfigError for what the run can't honour; takes out what is switched off or as it is."""
    for key in list(config):
        value = config[key]
        if key not in KNOWN:
            raise ConfigError(f"{path}: DeepSpeed has no {key!r}{did_you_mean(key, KNOWN)}")
        if key in HONOURED and not (value == "auto" or isinstance(value, HONOURED[key])):
            kinds = " or ".join(kind.__name__ for kind in HONOURED[key])
            raise ConfigError(f"{path}: {key} is {value!r}; it must be {kinds}")
        if key in ELSEWHERE:
            if not _is_off(value):
                raise ConfigError(f"{path}: {key} can't be used: {ELSEWHERE[key]}; remove it")
            del config[key]
        elif key in ONLY:
            if value not in (ONLY[key], "auto"):
                raise ConfigError(
                    f"{path}: {key} is {value!r}, and a run always has {ONLY[key]!r}; remove it"
                )
            del config[key]


def refuse_unusable_zero(
    zero: Mapping[str, Any], stage: int, path: object, *, on_gpu: bool
) -> None:
    """ConfigError for parts of `zero_optimization` that are not for this stage, or not for us."""
    place = f"{path}: zero_optimization"
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        section = zero.get(key) or {}
        device = section.get("device", "none")
        if device == "nvme":
            raise ConfigError(
                f'{place}.{key}.device is "nvme", which would be compiled at the first launch of '
                'every host; use "cpu"'
            )
        if device == "cpu" and stage < lowest:
            raise ConfigError(f"{place}.{key} needs stage {lowest} at least, found {stage}")
        if section.get("ratio", 1.0) != 1.0 or section.get("super_offload"):
            raise ConfigError(f"{place}.{key}: only offload of everything is supported")
    for key in ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"):
        if key in zero:
            raise ConfigError(
                f'{place}.{key} is an old spelling; write "offload_optimizer" or "offload_param": '
                '{"device": "cpu"}'
            )
    if zero.get("zenflow"):
        raise ConfigError(f"{place}.zenflow can't be used: a step would be applied in two parts")
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(f"{place}.compute_grad_norm must be true: the run clips by the norm")
    _refuse_quantized(zero, stage, place, on_gpu=on_gpu)


def _refuse_quantized(zero: Mapping[str, Any], stage: int, place: str, *, on_gpu: bool) -> None:
    plus = [key for key in zero if key.startswith("zero_quantized") and zero[key]]
    plus += ["zero_hpz_partition_size"] if zero.get("zero_hpz_partition_size", 1) != 1 else []
    if plus and stage != 3:
        raise ConfigError(f"{place}.{plus[0]} needs stage 3, found {stage}")
    if plus and not on_gpu:
        raise ConfigError(f"{place}.{plus[0]} needs a GPU; remove it to train on CPUs")


def _is_off(value: Any) -> bool:
    return value in (None, False, {}) or (isinstance(value, dict) and value.get("enabled") is False)
