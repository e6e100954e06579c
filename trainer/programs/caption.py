"""What tools/caption.py does: whose captions, and the codes that they are written of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.curation.captioner import Captioner, FolderCaptioner, write_captions
from trainer.curation.code_captioner import CodebookCaptioner
from trainer.curation.code_files import write_codes
from trainer.errors import ConfigError
from trainer.models.code_tower import CodeTower
from trainer.programs.scan import hash_of
from trainer.programs.workdir import open_workdir
from trainer.run import pixels_of


def caption_from(arguments: Any, comm: Comm, *, say: Callable[[str], None]) -> None:
    """What tools/caption.py asks for: captions, codes, or both."""
    if arguments.out is None and arguments.codes is None:
        raise ConfigError("give --out FOLDER for captions, --codes FOLDER for codes, or both")
    captioner = open_captioner(
        arguments.model,
        comm,
        most_tokens=arguments.most_tokens,
        beams=arguments.beams,
        rows=arguments.rows,
    )
    if arguments.codes is not None:
        if not isinstance(captioner, CodebookCaptioner):
            raise ConfigError(
                f"{arguments.model} has no codes; give --codes with a run of the recipe codebook"
            )
        write_codes(arguments.data, arguments.codes, captioner, comm, images=arguments.images)
        say(f"a file of codes for each shard is in {arguments.codes}")
        say(f"next: python tools/reduce.py SCAN ... --codes {arguments.codes} --clusters N")
    if arguments.out is not None:
        write_captions(
            *(arguments.data, arguments.out, captioner, comm),
            select=arguments.select,
            images=arguments.images,
            say=say,
        )


def open_captioner(model: Path, comm: Comm, **how: int) -> Captioner:
    """The captioner of a run's newest checkpoint, or of a folder that transformers loads."""
    if not (model / "checkpoints").is_dir():
        return FolderCaptioner(model, comm.device, **how)
    trained = open_workdir(model, comm)
    words, found = trained.run.recipe.words(), trained.model
    if not isinstance(found, CodeTower) or words is None:
        raise ConfigError(
            f"{model} is a run of {trained.run.recipe.name}, which writes no captions; train "
            "launch/runs/codebook_quick.yaml, or give a folder of a captioner"
        )
    assert isinstance(trained.tokenizer, PreTrainedTokenizerFast)
    about: dict[str, object] = {"model": model.name, "weights": hash_of(found)}
    return CodebookCaptioner(
        found,
        pixels_of(trained.run),
        trained.tokenizer,
        comm.device,
        about=about,
        longest=words.length,
        **how,
    )
