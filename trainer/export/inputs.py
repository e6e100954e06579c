"""What feeds an exported model: its tokenizer and image processor, as the trainer feeds it.

folder/                tokenizer.json and tokenizer_config.json (if there is a text tower),
                       processor_config.json, preprocessor_config.json
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import CLIPProcessor, PreTrainedTokenizerFast, SiglipProcessor

from trainer.data.pixels import Pixels
from trainer.data.tokenize import save_tokenizer


def save_inputs(
    folder: Path,
    *,
    images: Pixels,
    tokenizer: PreTrainedTokenizerFast | None,
    text_length: int,
    masked: bool = True,
) -> None:
    """Write both so that `AutoProcessor`, `AutoTokenizer`, `AutoImageProcessor` and the pipelines
    need no further arguments: texts are cut at `text_length`, special tokens written in a text are
    text, and nothing is returned that the model was not trained on. A model that is not `masked`
    sees the padding of rows of one length, as SigLIP does."""
    pixels = images.processor()
    if tokenizer is not None:
        words = copy.deepcopy(tokenizer)
        words.model_max_length = text_length
        words.padding_side = "right"
        processor = CLIPProcessor if masked else SiglipProcessor
        processor(pixels, words).save_pretrained(folder)
        save_tokenizer(words, folder)
        _say_as_trained(folder / "tokenizer_config.json", masked=masked)
    pixels.save_pretrained(folder)


def _say_as_trained(path: Path, *, masked: bool) -> None:
    settings: dict[str, Any] = json.loads(path.read_text())
    settings |= {
        "model_input_names": ["input_ids", "attention_mask"] if masked else ["input_ids"],
        "split_special_tokens": True,
    }
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
