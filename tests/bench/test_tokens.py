"""The tokens benchmark counts what is computed: half the patches, fewer products."""

from __future__ import annotations

from trainer.bench.tokens import TokensCase, run
from trainer.models.two_tower import TwoTowerConfig

TOWER = {"width": 64, "layers": 4, "heads": 2}
MODEL = TwoTowerConfig.model_validate(
    {
        "image_size": 32,
        "patch_size": 4,
        "text_length": 8,
        "vocabulary": 300,
        "embed_dim": 16,
        "image": TOWER,
        "text": {"width": 32, "layers": 1, "heads": 2},
    }
)


def test_every_side_counts_fewer_products_for_fewer_patches() -> None:
    rows = run(TokensCase(model=MODEL, global_batch=8, rounds=1, head_hidden=32))
    assert len(rows) == 6
    products = {row["side"]: row["products_to_clip"] for row in rows}
    assert products["clip"] == 1.0
    assert 0.45 < products["clip, random"] < 0.6
    # Two halves with their gradients, and a third of a pass for the copy; a quarter of it at half.
    assert products["clip, random"] < products["aclip, half"] < products["aclip"] < 1.5
    assert products["aclip, half"] < 1.2
    assert 1.8 < products["slip"] < products["two views"] < 2.5
    assert all(row["seconds"] > 0 for row in rows)
