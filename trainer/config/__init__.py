"""One YAML file describes a run; every key is checked, every default stands here.

`load_run(path, overrides)` reads YAML, applies dotted `key=value` overrides and validates.
`dump_run(config)` writes the resolved YAML back: `load_run(dump_run(c)) == c`.
A recipe's own keys are validated by the `Config` of its file (`trainer/recipes/<name>.py`).
"""

from trainer.config.data import (
    IMAGE_FIELDS,
    AugmentConfig,
    CaptionConfig,
    DataConfig,
    Geometry,
    NoiseConfig,
    ViewsConfig,
    Weight,
)
from trainer.config.evals import EvalConfig, EvalName, Frequency, OodScore
from trainer.config.optim import AverageConfig, OptimConfig, Weights
from trainer.config.period import NEVER, Every, Period
from trainer.config.recipe import ModelSection, RecipeConfig, WordsConfig
from trainer.config.run import RunConfig, dump_run, load_run, micro_batches, parse_run
from trainer.config.section import (
    Fraction,
    Frozen,
    LocalPath,
    MemberName,
    ModelPath,
    OnlyWhere,
    OnlyWith,
    PositiveInt,
    ShardSpec,
)

__all__ = [
    "IMAGE_FIELDS",
    "NEVER",
    "AugmentConfig",
    "AverageConfig",
    "CaptionConfig",
    "DataConfig",
    "EvalConfig",
    "EvalName",
    "Every",
    "Fraction",
    "Frequency",
    "Frozen",
    "Geometry",
    "LocalPath",
    "MemberName",
    "ModelPath",
    "ModelSection",
    "NoiseConfig",
    "OnlyWhere",
    "OnlyWith",
    "OodScore",
    "OptimConfig",
    "Period",
    "PositiveInt",
    "RecipeConfig",
    "RunConfig",
    "ShardSpec",
    "ViewsConfig",
    "Weight",
    "Weights",
    "WordsConfig",
    "dump_run",
    "load_run",
    "micro_batches",
    "parse_run",
]
