"""What an exported model's README says of its run: front matter, figures, origin, licences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from trainer.data.decode import BadSample
from trainer.data.fields import json_of
from trainer.data.remote import expand_shards
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import TrainerError

MOST_SAMPLES = 2000
"""Whose licences are read; about so many, evenly out of a few shards."""
KEYS = ("licence", "license", "LICENSE", "rights")
"""Keys of a sample's json that say one."""

OWN = "native form alone"
"""What loads a folder that no library's class does."""

_TASKS = {
    "CLIPModel": "zero-shot-image-classification",
    "CLIPVisionModelWithProjection": "image-feature-extraction",
}


def front_matter(loads_as: str, *, forms: tuple[str, ...] = ()) -> str:
    """The YAML block by which a model hub lists a model."""
    library = "open_clip" if "open_clip" in forms else "transformers"
    lines = [
        "---",
        *([] if loads_as == OWN else [f"library_name: {library}"]),
        f"pipeline_tag: {_TASKS.get(loads_as, 'feature-extraction')}",
        "license: other",
        "license_name: see-training-data",
        "license_link: README.md",
        f"tags: [{', '.join(('protoscale', 'clip', *forms))}]",
        "---",
    ]
    return "\n".join(lines) + "\n\n"


def figures_section(table: str, *, step: int) -> str:
    """The run's own evaluations, floors beside them; empty where there were none."""
    if not table:
        return ""
    return f"\n## Figures\n\nOf this run's evaluations at step {step}:\n\n```\n{table}\n```\n"


def origin_section(workdir: Path, *, step: int) -> str:
    """Commit, command and packages of the last start of the run, as its workdir keeps them."""
    try:
        start = json.loads((workdir / "environment.json").read_text())[-1]
        commit, packages = start["commit"], start["packages"]
        dirty = " with changed files" if start["dirty"] else ""
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    names = ", ".join(f"{name} {packages[name]}" for name in packages if name in _NAMED)
    at = f"commit `{commit}`{dirty} of ProtoScale" if commit else "an unknown commit of ProtoScale"
    return f"\n## Origin\n\nStep {step}, trained by {at}, with {names}.\n"


_NAMED = ("torch", "transformers", "deepspeed")


def stated_licences(spec: str) -> str | None:
    """What the training shards state, in a sentence; None where they state nothing.

    Of large data a share is read, and the sentence says so.
    """
    try:
        shards = ShardSet.open(spec)
        found, read = _count(shards)
    except (TrainerError, OSError):
        return None
    if not found:
        return None
    known = ", ".join(f"{name} ({count:,})" for name, count in found.most_common(12))
    if len(found) > 12:
        known += f" and {len(found) - 12} more"
    of = f"{read:,} samples" if read == len(shards) else f"{read:,} of {len(shards):,} samples"
    silent = read - sum(found.values())
    rest = f"; {silent:,} state none" if silent else ""
    return (
        f"Trained on `{_short(spec)}`. Licences that its samples state, of {of}: {known}{rest}. "
        f"{_manifest_sentence(spec)}The weights may be bound by their terms."
    )


def _manifest_sentence(spec: str) -> str:
    """Which vendor's pictures the shards hold under which licence, by the corpus's own manifest;
    empty where none that names them lies beside the shards."""
    try:
        paths = [Path(path) for path in expand_shards(spec)]
        said = json.loads((paths[0].parent / "manifest.json").read_text())
        splits = {said["shards"][path.name]["split"] for path in paths}
        vendors = sorted({name for split in splits for name in said["splits"][split]["vendors"]})
        known = ", ".join(f"{name} {said['vendors'][name]['licence']}" for name in vendors)
    except (OSError, ValueError, LookupError, TypeError, TrainerError):
        return ""
    return f"By the manifest beside them: {known}. "


def _count(shards: ShardSet) -> tuple[Counter[str], int]:
    few = len(shards) <= MOST_SAMPLES
    found: Counter[str] = Counter()
    read = 0
    for index in range(len(shards)) if few else shards.some(MOST_SAMPLES).tolist():
        try:
            values = json_of(shards.read_json(index).fields)
        except (BadSample, DamagedSample):
            continue
        read += 1
        if (licence := _licence(values)) is not None:
            found[licence] += 1
    return found, read


def _licence(values: Mapping[str, object]) -> str | None:
    for key in KEYS:
        value = values.get(key)
        if isinstance(value, str) and value.strip():
            return " ".join(value.split())
    return None


def _short(spec: str) -> str:
    """Without folders and what a signed URL carries; they are the machine's."""
    return "::".join(part.split("?")[0].rpartition("/")[2] for part in spec.split("::"))


def readable_by_others(folder: Path) -> None:
    """Files that some writers keep to their owner are for everybody to read."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))
