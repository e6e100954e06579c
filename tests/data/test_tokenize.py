"""Our tokenizer comes back as it went in; others keep their own special tokens."""

import json
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.fixtures.emoji import read_pairs
from trainer.data.tokenize import (
    BOS,
    EOS,
    PAD,
    load_tokenizer,
    save_tokenizer,
    token_ids,
    tokenize,
    train_tokenizer,
)
from trainer.errors import ConfigError

CAPTIONS = [record["name"] for record in read_pairs()]
LANGUAGES = [
    "Grüner Apfel",
    "りんご、赤い",
    "تفاحة حمراء",
    "सेब",
    "🍎 one 🍏",
    "naïve café",
    "a\u0301",
]


def described(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Everything it is, less the truncation that its latest call has set."""
    return {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CAPTIONS, vocab_size=600, length=16)


def test_the_vocabulary_has_every_byte_and_three_special_tokens(tokenizer):
    assert 259 < len(tokenizer) <= 600
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(ids) == 3
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (PAD, BOS, EOS)
    assert tokenizer.unk_token is None
    few = train_tokenizer(["ab ab"], vocab_size=5000, length=8)
    assert 259 < len(few) < 270


def test_a_text_stands_between_bos_and_eos_and_padding_is_masked(tokenizer):
    assert tokenize(tokenizer, [], length=12)[0].shape == (0, 12)
    tokens, mask = tokenize(tokenizer, ["red apple", "fire"], length=12)
    assert tokens.shape == mask.shape == (2, 12)
    for row in range(2):
        real = tokens[row][mask[row]]
        assert real[0] == tokenizer.bos_token_id
        assert real[-1] == tokenizer.eos_token_id
        assert (tokens[row][~mask[row]] == tokenizer.pad_token_id).all()
        assert mask[row].int().diff().max() <= 0  # padding is on the right only
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == "red apple"


def test_truncation_keeps_bos_and_eos(tokenizer):
    long = " ".join(CAPTIONS)
    tokens, mask = tokenize(tokenizer, [long], length=9)
    assert mask.all()
    assert tokens[0, 0] == tokenizer.bos_token_id
    assert tokens[0, -1] == tokenizer.eos_token_id
    assert tokens[0, 1:-1].tolist() == token_ids(tokenizer, [long], length=500)[0][1:8]


@pytest.mark.parametrize("text", [*LANGUAGES, *CAPTIONS[:20]])
def test_any_language_comes_back_in_lower_case(tokenizer, text):
    import unicodedata

    ids = token_ids(tokenizer, [text], length=500)[0]
    expected = unicodedata.normalize("NFC", text).lower()
    assert tokenizer.decode(ids, skip_special_tokens=True) == expected


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_every_string_has_tokens_between_bos_and_eos(text):
    tokenizer = _trained()
    ids = token_ids(tokenizer, [text], length=400)[0]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert not special & set(ids[1:-1])
    again = tokenizer.decode(ids, skip_special_tokens=True)
    assert token_ids(tokenizer, [again], length=400)[0] == ids


def _trained(cache: list[PreTrainedTokenizerFast] = []) -> PreTrainedTokenizerFast:  # noqa: B006
    if not cache:
        cache.append(train_tokenizer(CAPTIONS, vocab_size=400, length=16))
    return cache[0]


def test_the_names_of_special_tokens_in_a_caption_are_plain_text(tokenizer):
    ids = token_ids(tokenizer, [f"a {EOS} b {PAD}"], length=100)[0]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in ids


def test_equal_captions_give_equal_tokenizers_whatever_their_order(tokenizer):
    mixed = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    other = train_tokenizer(mixed, vocab_size=600, length=16)
    assert described(other) == described(tokenizer)


def test_another_process_with_one_thread_trains_the_same_tokenizer(tokenizer):
    code = (
        "import json, sys; from trainer.data.tokenize import train_tokenizer as t;"
        "print(t(json.load(sys.stdin), vocab_size=600, length=16).backend_tokenizer.to_str())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(CAPTIONS),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env={"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert json.loads(done.stdout) == described(tokenizer)


def test_a_saved_folder_gives_identical_ids_everywhere(tokenizer, tmp_path):
    tokenize(tokenizer, CAPTIONS, length=5)  # a fast tokenizer remembers how it was called
    save_tokenizer(tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None
    texts = [*CAPTIONS[:50], *LANGUAGES, "", " ".join(CAPTIONS)]
    expected = tokenize(tokenizer, texts, length=16)
    found = tokenize(load_tokenizer(str(tmp_path)), texts, length=16)
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.model_max_length == 16
    direct = plain(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(direct["input_ids"], expected[0])
    assert torch.equal(direct["attention_mask"].bool(), expected[1])


def foreign(folder: Path, **special: str) -> str:
    """A word tokenizer of somebody else's, saved by transformers."""
    words = {word: row for row, word in enumerate(["<unk>", "<end>", "[CLS]", "[SEP]", "red"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in special:
        ends = [(name, words[name]) for name in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


def test_a_decoder_tokenizer_without_padding_pads_with_its_end_and_masks_it(tmp_path):
    tokenizer = load_tokenizer(foreign(tmp_path, eos_token="<end>", unk_token="<unk>"))
    tokens, mask = tokenize(tokenizer, ["red red", "red"], length=4)
    assert tokens.tolist() == [[4, 4, 1, 1], [4, 1, 1, 1]]
    assert mask.tolist() == [[True, True, False, False], [True, False, False, False]]


def test_a_bert_like_tokenizer_keeps_its_frame(tmp_path):
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "<end>"}
    tokenizer = load_tokenizer(foreign(tmp_path, **special, unk_token="<unk>"))
    tokens, mask = tokenize(tokenizer, ["red red red red", "red"], length=4)
    assert tokens.tolist() == [[2, 4, 4, 3], [2, 4, 3, 1]]
    assert mask.sum(1).tolist() == [4, 3]


def test_mistakes_are_said_in_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="below 256 bytes"):
        train_tokenizer(["a"], vocab_size=100, length=8)
    with pytest.raises(ConfigError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path / "nothing"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = foreign(tmp_path / "endless", unk_token="<unk>")
    with pytest.raises(ConfigError, match="neither a pad nor an end token"):
        load_tokenizer(folder)
