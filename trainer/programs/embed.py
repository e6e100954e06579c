"""What tools/embed.py does: which teacher, over which shards, into which store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.comm import Comm, agreed
from trainer.config import RunConfig
from trainer.data.pixels import Pixels
from trainer.data.texts import TextSet
from trainer.errors import ConfigError
from trainer.evals.zero_shot import prompts_of
from trainer.models.stored_tower import StoredTower
from trainer.programs.workdir import open_workdir
from trainer.run import pixels_of
from trainer.store import EmbeddingStore, Identity
from trainer.teachers.existing_vectors import StoredVectors
from trainer.teachers.fill import Embedded, ReadsApart, Teacher, embed
from trainer.teachers.frozen import Shard
from trainer.teachers.image import ImageTeacher
from trainer.teachers.pca import FILE, Pca, ProjectedTeacher, fit_pca, load_pca
from trainer.teachers.pinned import DEFAULT_CACHE, PINNED, fetch_teacher, is_there
from trainer.teachers.spec import TeacherSpec, load_teacher, refuse_placement
from trainer.tuning.views import ImageViews

Report = Callable[[str], None]


def open_teacher(spec: TeacherSpec, comm: Comm, *, cache: Path = DEFAULT_CACHE) -> Teacher:
    """A spec's teacher on this rank's device; one rank fetches it, the others find it there.

    Besides what `load_teacher` takes, the workdir of a run: its newest image tower.
    """
    if (Path(spec.model) / "checkpoints").is_dir():
        return _trained_tower(spec, comm)
    if spec.model in PINNED:
        main = comm.is_main
        agreed(comm, lambda: fetch_teacher(spec.model, cache) if main else None)
    return load_teacher(
        spec, device=comm.device, cache=cache, shard=_sharder(comm) if spec.sharded else None
    )


def _sharder(comm: Comm) -> Shard:
    from trainer.engine.frozen import FrozenEngine  # deepspeed is imported where it is wanted

    return lambda model: FrozenEngine(model, comm)


def stored_as(teacher: Teacher, *, dtype: str, pca: Path | None = None) -> Teacher:
    """The teacher with its vectors projected and in another precision on disk."""
    if pca is not None:
        teacher = ProjectedTeacher(teacher, *load_pca(pca))
    return teacher if dtype == teacher.identity.dtype else _Recoded(teacher, dtype)


def fit_components(store: Path, out: Path, dim: int, comm: Comm) -> Pca:
    """The components of a store's vectors, written to the file `out` by one rank."""
    pca = fit_pca(EmbeddingStore.open(store), dim, comm)
    agreed(comm, lambda: _save(pca, out) if comm.is_main else None)
    return pca


def project_store(
    spec: str, source: Path, out: Path, dim: int, comm: Comm, *, dtype: str, report: Report
) -> Embedded:
    """Write the store `out`: the vectors of `source` on their first `dim` components."""
    place = out / FILE
    if not place.exists():  # a build that goes on keeps the components it began with
        fit_components(source, place, dim, comm)
    teacher = stored_as(StoredVectors(EmbeddingStore.open(source)), dtype=dtype, pca=place)
    return embed(spec, out, teacher=teacher, comm=comm, report=report)


def class_prompts(run: RunConfig) -> TextSet:
    """The prompts of the class names of a run's zero-shot evaluations."""
    asked = [entry for entry in run.evals if entry.name == "zero_shot"]
    if not asked:
        raise ConfigError("the run has no zero_shot evaluation, so no class names to embed")
    return TextSet(text for entry in asked for text in prompts_of(entry))


def list_teachers(cache: Path) -> list[dict[str, Any]]:
    """The pinned teachers: name, what they are, whether they are in the cache."""
    return [
        {
            "teacher": name,
            "cached": "yes" if is_there(name, cache) else "no",
            "package": pinned.package,
            "licence": pinned.licence,
            "about": pinned.about,
        }
        for name, pinned in PINNED.items()
    ]


def with_views(teacher: Teacher, count: int) -> Teacher:
    """A teacher of images that gives so many random views of each beside the whole image."""
    if not isinstance(teacher, ImageTeacher):
        raise ConfigError(
            f"--views are of images, and {teacher.identity.teacher} reads none; give a vision model"
        )
    return ImageViews(teacher, count=count, seed=0)


class _Recoded:
    """A teacher whose vectors are stored in another precision."""

    def __init__(self, teacher: Teacher, dtype: str) -> None:
        self.teacher, self.dtype = teacher, dtype
        self.chunk, self.read, self.encode = teacher.chunk, teacher.read, teacher.encode
        self.stand_by = teacher.stand_by
        if isinstance(teacher, ReadsApart):
            self.reader = teacher.reader

    @property
    def identity(self) -> Identity:
        return self.teacher.identity.model_copy(update={"dtype": self.dtype})


class _Embeddings(nn.Module):
    """The image embedding of a trained model's tower."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.tower.images(pixels)
        return found


def _trained_tower(spec: TeacherSpec, comm: Comm) -> ImageTeacher:
    refuse_placement(spec, "a run's tower")
    if spec.kind != "image":
        raise ConfigError(f"{spec.model} is a run: its image tower is read with kind=image")
    trained = open_workdir(Path(spec.model), comm)
    tower: Any = trained.model.image
    if isinstance(tower, StoredTower):
        raise ConfigError(
            f"{spec.model} reads stored features and no images; embed with the encoder that they "
            "are of"
        )
    pixels = pixels_of(trained.run)
    model = _Embeddings(tower).to(comm.device)
    return ImageTeacher(
        model,
        pixels,
        name=spec.name or f"{Path(spec.model).name} at step {trained.restored.step}",
        model_hash=_hash_of(tower),
        pooling="embedding",
        dim=trained.run.recipe.model.embed_dim,
        settings=_settings_of(trained.run, pixels),
        unit_norm=spec.unit_norm,
        batch_images=spec.batch_images,
    )


def _settings_of(run: RunConfig, pixels: Pixels) -> str:
    """SHA-256 of the model's section and of how images are prepared."""
    text = run.recipe.model.model_dump_json() + pixels.text
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_of(model: nn.Module) -> str:
    """SHA-256 over names and bytes of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _save(pca: Pca, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    pca.save(out)
