"""Run files that the program wrote before the meaning of some keys was settled.

A checkpoint has its run beside it with every default written out. Until November 2026 that said
things which the recipe did not do, and which are refused today. In such a file they are dropped, so
that its run goes on; in a file that somebody wrote himself they are refused as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WRITTEN_THEN = frozenset(
    {"workdir", "seed", "steps", "global_batch", "micro_batch", "deepspeed", "recipe", "data"}
    | {"gradient_checkpointing", "optim", "evals", "log_every", "save_every", "keep_checkpoints"}
    | {"max_skipped_steps", "comm_timeout_seconds"}
)
"""What every run file had that the program wrote."""
NOT_WRITTEN_THEN = "average"
LOGIT_BIAS_THEN = -10.0
"""Where the bias began if nobody said anything; now that is left open."""


def brought_up_to_date(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run file, without what an older program wrote and did not mean."""
    recipe, model = values.get("recipe"), None
    if isinstance(recipe, Mapping):
        model = recipe.get("model")
    if not _is_of_then(values) or not isinstance(recipe, Mapping):
        return dict(values)
    changes = {"model": _model(recipe.get("name"), model)} if isinstance(model, Mapping) else {}
    if "head" in recipe and isinstance(recipe["head"], Mapping):
        changes["head"] = _prototype_head(recipe["head"], loss=recipe.get("loss"))
    return {**values, "recipe": {**recipe, **changes}}


def _is_of_then(values: Mapping[str, Any]) -> bool:
    return values.keys() >= WRITTEN_THEN and NOT_WRITTEN_THEN not in values


def _model(recipe: Any, model: Mapping[str, Any]) -> dict[str, Any]:
    dropped = set()
    towers = [tower for tower in map(model.get, ("image", "text")) if isinstance(tower, Mapping)]
    loaded = [tower for tower in towers if tower.get("path")]
    if recipe == "siglip" or not model.get("bias"):
        dropped.add("bias")  # SigLIP had one whatever stood there
    if recipe != "siglip" or (model.get("logit_bias_init") == LOGIT_BIAS_THEN and not loaded):
        dropped.add("logit_bias_init")
    if recipe == "clip":
        dropped |= {"bias", "head"}  # ... and CLIP none
    if recipe == "siglip":
        dropped.add("head")
    if model.get("tokenizer") or (len(towers) == 2 and towers[1].get("path")):
        dropped.add("vocabulary")
    kept = {key: value for key, value in model.items() if key not in dropped}
    if not kept.get("head") and recipe != "protoclip":
        kept.pop("prototype_scale_init", None)
    return kept


def _prototype_head(head: Mapping[str, Any], *, loss: Any) -> dict[str, Any]:
    """False is what is meant where nothing is said, but for the cross-entropy of Partial FC."""
    says_nothing = head.get("union_positives") is False and loss != "pfc_ce"
    return {k: v for k, v in head.items() if not (says_nothing and k == "union_positives")}
