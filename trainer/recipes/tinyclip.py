"""TinyCLIP: a small pair of towers learns who matches whom from a large one (2309.12314).

    L = CE(A_student, A_teacher), both ways,   A = softmax(scale * images texts^T)

It starts from the teacher's weights: either a part of them that is chosen at once (`inherit`), or
all of them, of which gates learn what can go, stage by stage (`gates`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig
from trainer.engine.kept import Kept
from trainer.losses.contrastive import info_nce
from trainer.losses.sparse_gates import Gates, prunable_weights
from trainer.models.gated import GatedTower
from trainer.models.narrow import NarrowShape, narrowed
from trainer.models.tower import Tower
from trainer.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from trainer.parts.distillation import (
    DistillConfig,
    TeacherPair,
    distillation,
    teacher_of,
    with_distillation,
)
from trainer.parts.gates import GatesConfig, LearnedGates
from trainer.parts.inheritance import (
    InheritConfig,
    Units,
    inherit_from,
    kept_places,
    refuse_other_ids,
    with_activations,
)
from trainer.recipe import Context, Encode, Part, Samples, WithoutPhases
from trainer.types import Batch, Features, Losses, Progress

if TYPE_CHECKING:  # deepspeed is imported where it is wanted
    from trainer.engine.zero import Engine

TOWERS: tuple[Literal["image", "text"], ...] = ("image", "text")


class Config(RecipeConfig):
    name: Literal["tinyclip"] = "tinyclip"
    model: TwoTowerConfig = TwoTowerConfig()
    distill: DistillConfig
    """The teacher."""
    weight: float = Field(default=0.0, ge=0)
    """Of the contrastive loss against the captions themselves; the original has none."""
    student_scale: float | None = Field(default=None, gt=0)
    """A fixed multiplier of the student's cosines; learned where None. The published runs fix 50
    for both (`distill.logit_scale` is the teacher's)."""
    inherit: InheritConfig | None = None
    """Begin with a part of a larger pair's weights, and with its activations where
    `model.*.activation` says none."""
    gates: GatesConfig | None = None
    """Learn which units can go, and cut them away."""

    @model_validator(mode="before")
    @classmethod
    def _activations_are_inherited(cls, values: Any) -> Any:
        return with_activations(values)

    @model_validator(mode="after")
    def _gates_need_trained_towers(self) -> Config:
        if self.gates is not None and not (self.model.image.trained and self.model.text.trained):
            raise ValueError("gates cut both towers; neither may be frozen (trained: false)")
        if self.gates is not None and (self.model.image.lora or self.model.text.lora):
            raise ValueError("gates cut whole weights; drop model.*.lora, or gates")
        if self.inherit is not None and (self.model.image.path or self.model.text.path):
            raise ValueError("inherit fills towers of given sizes; drop model.*.path, or inherit")
        return self

    def join(self, seed: int) -> TeacherPair | None:
        return self.distill.join()


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
    shape: Mapping[str, Any] | None = None,
) -> TwoTower:
    """The pair of towers; `shape` is what `Recipe.shape` said of one that has been cut."""
    model = build_two_tower(config.model, tokenizer, comm, seed=seed)
    if config.inherit is not None:
        assert tokenizer is not None
        refuse_other_ids(config.inherit, tokenizer)
        for name in TOWERS:
            inherit_from(config.inherit, name, getattr(model, name))
    if shape is None:
        return model
    for name in TOWERS:
        if found := shape["sizes"].get(name):
            setattr(model, name, narrowed(getattr(model, name), NarrowShape.read(found)))
        if gates := shape.get("open", {}).get(name):
            GatedTower(getattr(model, name)).final = Gates(*map(torch.tensor, gates))
            model.why_not_exported = (
                "its gates are still learning what goes; train to the end of the stage, where the "
                "model is cut, and export that"
            )
    return model


class Recipe(WithoutPhases):
    phase_name = "stage"

    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.context, self.comm = config, context, context.comm
        said = context.shape or {"phase": 0, "sizes": {}, "whole": 0}
        self.phase: int = said["phase"]
        self.sizes: Mapping[str, Any] = said["sizes"]
        self.whole: int = said["whole"]
        self.model = self._built()
        self.teacher = teacher_of(config.distill, config.model, context)
        self.parts: dict[str, Part] = {"teacher": self.teacher}
        self.gates: LearnedGates | None = None
        self._make_ready()
        if self.phase % 2:
            self._learn()

    def attach(self, engine: Engine) -> None:
        self.engine = engine

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        """Equation 2, halved as in the published code."""
        if self.config.student_scale is not None:
            learned = features.tensor("logit_scale")
            # Times zero, so that the parameter is still part of the pass.
            features = features._replace(logit_scale=learned * 0 + self.config.student_scale)
        found = distillation(self.teacher, features, batch, self.comm)
        losses = with_distillation(Losses(), found, self.config.distill)
        image, text, scale = map(features.tensor, ("image", "text", "logit_scale"))
        losses = losses.with_term(
            "clip", info_nce(image, text, scale, self.comm), self.config.weight
        )
        if self.gates is not None:
            sparsity = self.gates.sparsity().detach().to(image.device, non_blocking=True)
            losses = losses.with_term("sparsity", sparsity, 0.0)
        return losses

    # -- stages ----------------------------------------------------------------------------------

    def shape(self) -> Mapping[str, Any] | None:
        """How far the stages are, and the sizes of towers that have been cut."""
        if self.config.gates is None:
            return None
        said = {"phase": self.phase, "sizes": self.sizes, "whole": self.whole}
        if self.gates is None:
            return said
        open_now = self.gates.final().items()
        return said | {"open": {name: [p.tolist() for p in gates] for name, gates in open_now}}

    def phase_due(self, progress: Progress) -> bool:
        return self._phase_of(progress.step) != self.phase

    def begin_phase(
        self, progress: Progress, encode: Encode, samples: Samples
    ) -> Mapping[str, Any]:
        """Gates begin to learn, or what they have closed is cut away."""
        figures: Mapping[str, Any] = {}
        while self.phase_due(progress):
            self.phase += 1
            figures = self._learn() if self.phase % 2 else self._cut(progress, samples)
        return figures

    def _phase_of(self, step: int) -> int:
        """Boundaries up to a step: odd while gates learn, even without gates."""
        boundaries, end = [], 0
        for stage in self.config.gates.stages if self.config.gates else ():
            boundaries += [end, end + stage.steps]
            end += stage.steps + stage.settle
        return sum(step >= boundary for boundary in boundaries)

    def _built(self) -> TwoTower:
        return build_model(
            *(self.config, self.context.tokenizer, self.comm),
            seed=self.context.seed,
            shape={"sizes": self.sizes} if self.sizes else None,
        )

    def _make_ready(self) -> None:
        """Hooks of gates come before the engine's, which take the weights away again."""
        self.gated: dict[str, GatedTower] = (
            {name: GatedTower(getattr(self.model, name)) for name in TOWERS}
            if self.config.gates
            else {}
        )
        if self.gated and not self.whole:
            self.whole = sum(
                prunable_weights(tower.sizes, head_dim=tower.head_dim)
                for tower in self.gated.values()
            )

    def _learn(self) -> dict[str, Any]:
        assert self.config.gates is not None
        stage = self.phase // 2
        self.gates = LearnedGates(
            *(self.config.gates, stage, self.gated),
            whole=self.whole,
            comm=self.comm,
            seed=self.context.seed,
        )
        self.parts["gates"] = self.gates
        return {"stage": stage + 1, "gates": "learn"}

    def _cut(self, progress: Progress, samples: Samples) -> dict[str, Any]:
        """Go on with the smaller model, and the moments of what it keeps."""
        assert self.gates is not None
        units = {name: open_units(gates) for name, gates in self.gates.final().items()}
        self.gates.remove()
        head_dims = {name: tower.head_dim for name, tower in self.gated.items()}
        self.sizes = {
            name: NarrowShape(
                len(one.hidden),
                head_dims[name],
                tuple(map(len, one.heads)),
                tuple(map(len, one.neurons)),
            )._asdict()
            for name, one in units.items()
        }
        checkpointed = is_checkpointed(self.model.image)
        self.model = self._built()
        self.model.gradient_checkpointing(checkpointed)
        self._make_ready()
        batch = next(iter(samples.view(progress.samples, self.comm.world_size, purpose="cut")))
        keep = kept_of(self.model, units, head_dims)
        self.engine.rebuild(self.model, batch, keep=keep)
        self.gates = None
        del self.parts["gates"]
        kept = sum(
            prunable_weights(tower.sizes, head_dim=tower.head_dim) for tower in self.gated.values()
        )
        return {"stage": self.phase // 2, "cut": 1 - kept / self.whole}


def open_units(gates: Gates) -> Units:
    """The units of gates that are 0 or 1."""
    hidden, *layers = (part.cpu() for part in gates)
    heads, neurons = ([row.nonzero().squeeze(1) for row in part] for part in layers)
    return Units(range(len(heads)), hidden.nonzero().squeeze(1), heads, neurons)


def kept_of(
    model: TwoTower, units: Mapping[str, Units], head_dims: Mapping[str, int]
) -> dict[str, Kept]:
    """Which part of the old model each parameter of the new towers is."""
    return {
        name: kept_places(name, units[tower], head_dim=head_dims[tower])
        for name, _ in model.named_parameters()
        if (tower := name.partition(".")[0]) in units
    }


def is_checkpointed(tower: Tower) -> bool:
    """Whether the blocks of a tower are computed again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())
