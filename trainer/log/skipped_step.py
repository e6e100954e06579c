"""Why a step was not applied: which rank, which samples, which term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import NonFiniteLoss
from trainer.types import Batch, Losses

if TYPE_CHECKING:  # deepspeed is imported where it is wanted
    from trainer.engine.zero import Engine

MOST_IDS = 5


def explain_skip(engine: Engine, batches: Sequence[Batch], losses: Losses) -> list[dict[str, Any]]:
    """What each rank finds when it looks again; the same list on every rank.

    Costs a forward pass without gradient, and happens only after a step that was not applied.
    `inputs` and `features` are sample ids whose pixels or features are not finite.
    """
    inputs: list[int] = []
    features: list[int] = []
    for batch in batches:
        inputs += _not_finite(batch.sample_id, [batch.images])
        rows = [value for value in engine.encode(batch).tensors().values() if value.dim() > 1]
        features += _not_finite(batch.sample_id, rows)
    terms = [name for name, value in losses.items() if not bool(torch.isfinite(value))]
    mine = {"rank": engine.comm.rank, "inputs": inputs, "features": features, "terms": terms}
    return engine.comm.gather_json(mine)


def one_line(found: Sequence[dict[str, Any]]) -> str:
    """The finding as a sentence that names the rank."""
    guilty = [entry for entry in found if entry["features"] or entry["inputs"]]
    terms = sorted({term for entry in found for term in entry["terms"]}) or ["the gradient"]
    if not guilty:
        return f"{', '.join(terms)} not finite on finite features; no rank is to blame alone"
    causes = []
    for entry in guilty:
        what = "pixels" if entry["inputs"] else "features"
        ids = entry["inputs"] or entry["features"]
        causes.append(f"rank {entry['rank']} ({what} of samples {', '.join(map(str, ids))})")
    return f"{', '.join(terms)} not finite because of {'; '.join(causes)}"


class SkippedSteps:
    """Counts the steps in a row that could not be applied."""

    def __init__(self, *, limit: int) -> None:
        self.limit, self.in_a_row = limit, 0

    def none(self) -> None:
        self.in_a_row = 0

    def one_more(self, why: str) -> None:
        """NonFiniteLoss, on all ranks, where these are more than `limit`."""
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            error = NonFiniteLoss(
                f"{self.in_a_row} steps in a row had a gradient that is not finite, more than "
                f"max_skipped_steps={self.limit}; last: {why}; lower the learning rate or look at "
                "these samples"
            )
            error.on_all_ranks = True
            raise error


def _not_finite(ids: torch.Tensor, rows: Sequence[torch.Tensor | None]) -> list[int]:
    bad = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for value in rows:
        if value is not None:
            bad |= ~torch.isfinite(value.flatten(1)).all(1)
    found: list[int] = ids[bad][:MOST_IDS].tolist()
    return found
