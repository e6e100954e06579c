"""One YAML file describes a run; every key is checked, every default stands here.

`load_run(path, overrides)` reads YAML, applies dotted `key=value` overrides and validates.
`dump_run(config)` writes the resolved YAML back: `load_run(dump_run(c)) == c`.

    the run       settings/run.py      RunConfig
    data          settings/data.py     DataConfig, CaptionConfig, NoiseConfig, ViewsConfig
    optim         settings/optim.py    OptimConfig, AverageConfig
    evals         settings/evals.py    EvalConfig
    recipe        settings/recipe.py   RecipeConfig; a recipe's own keys: `Config` of its file

Which members of a sample are its picture and its caption (`image_fields`, `caption_fields` of
other programs) is said by `data.images` and `data.captions.fields`.
"""

from trainer.settings.data import (
    IMAGE_FIELDS,
    AugmentConfig,
    CaptionConfig,
    DataConfig,
    Geometry,
    NoiseConfig,
    ViewsConfig,
    Weight,
)
from trainer.settings.evals import EvalConfig, EvalName, Frequency, OodScore
from trainer.settings.optim import AverageConfig, OptimConfig, Weights
from trainer.settings.period import NEVER, Every, Period
from trainer.settings.recipe import ModelSection, RecipeConfig, WordsConfig
from trainer.settings.run import RunConfig, dump_run, load_run, micro_batches, parse_run
from trainer.settings.section import (
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
