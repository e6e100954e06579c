"""What a run does where its loss jumps."""

from __future__ import annotations

from pydantic import Field

from trainer.settings.section import Frozen, PositiveInt


class SpikesConfig(Frozen):
    """Where the loss jumps, or stays not finite, the run goes back to a checkpoint and on behind
    the samples that it has read since. What is left out stands in WORKDIR/left_out.json, so a
    start anew leaves it out too."""

    deviations: float = Field(default=6.0, gt=0)
    """A loss is a spike that is so many robust standard deviations (1.4826 times the median
    distance from the median, and one hundredth of the median at least) above the median of the
    window."""
    window: int = Field(default=100, ge=4)
    """Applied steps before the one that is looked at; there are no spikes before so many."""
    settle: int = Field(default=10, ge=0)
    """Steps. A checkpoint that is younger than this at a spike may hold what led to it; an older
    one is gone back to where there is one."""
    most: PositiveInt = 3
    """Times that a run goes back before it ends with an error."""
