"""Every error a user can cause, as one tree.

TrainerError
├── ConfigError        a YAML key, a value, or two values that do not fit together
├── DataError          a shard, an index, a sample, or too many bad samples
├── CheckpointError    a checkpoint that is damaged, missing or of another run
├── LostRank           another rank was killed, can't be reached, or hangs (exit code 3)
└── NonFiniteLoss      training met NaN or infinity more often than it may

The message says what is wrong with its numbers, and the way out. `python -m trainer` and the
tools print it as one sentence and exit with code 2, or 3 where a start anew may help; any other
exception is our own bug.
"""

from __future__ import annotations

from trainer.addresses import all_without_secrets


class TrainerError(Exception):
    """Base of all errors that are meant for the user. URLs in it have lost their passwords."""

    def __init__(self, *said: object) -> None:
        super().__init__(*all_without_secrets(list(said)))

    on_all_ranks = False
    """True where every rank raises it at the same point, so that they can still save together."""
    exit_code = 2
    """Of a program that ends by it."""
    is_said = False
    """True where it was printed before the ranks parted."""


class ConfigError(TrainerError):
    """The configuration is wrong or contradicts itself."""


class DataError(TrainerError):
    """The data are missing, damaged or rejected beyond the budget."""


class CheckpointError(TrainerError):
    """A checkpoint can't be used."""


class LostRank(TrainerError):
    """A rank is gone or hangs; nothing is wrong with the run, which may be started again."""

    exit_code = 3


class NonFiniteLoss(TrainerError):
    """NaN or infinity stopped the run."""
