"""Shapes in signatures are checked during tests; nothing is looked up on a model hub."""

import gc
import os
from importlib import import_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from tests.lanes import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_ignore_collect,
    pytest_runtest_call,
    pytest_runtest_teardown,
    pytest_terminal_summary,
)
from tests.shapes import check_shapes

__all__ = [
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_ignore_collect",
    "pytest_runtest_call",
    "pytest_runtest_teardown",
    "pytest_terminal_summary",
]

check_shapes("trainer")

# Pydantic looks for the sentence of each key in all modules there are: soonest while they are few.
import_module("trainer.config")

# What imports make stays, and looking through it again and again is a tenth of collecting.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()
