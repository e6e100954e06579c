"""Shapes in signatures are checked during tests; nothing is looked up on a model hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from jaxtyping import install_import_hook

install_import_hook("trainer", "beartype.beartype")
