"""Text models on disk, written once a session."""

from __future__ import annotations

import pytest

from tests.models.small import save_bert, save_llama


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a causal and of a bidirectional text model."""
    folder = tmp_path_factory.mktemp("towers")
    return {"llama": save_llama(folder / "llama"), "bert": save_bert(folder / "bert")}
