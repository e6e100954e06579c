"""Text vectors: each depends on its own text alone and is what a plain forward pass gives."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerFast

from tests.fixtures.emoji import read_pairs, write_shards
from tests.ranks import run_ranks
from tests.teachers.small_teachers import CAPTIONS, DIM, save_bert, save_llama, save_t5
from trainer.comm import Comm
from trainer.errors import ConfigError, DataError
from trainer.store import EmbeddingStore
from trainer.teachers.batches import Budget, length_batches
from trainer.teachers.fill import embed
from trainer.teachers.prompts import PromptSet, Reading, as_sentence, load_prompts
from trainer.teachers.spec import TeacherSpec, load_teacher, read_spec
from trainer.teachers.text import TextTeacher

FACETS = ("this image description means in just one word :", "the category of the main object :")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "bert": save_bert(root / "bert"),
        "llama": save_llama(root / "llama"),
        "t5": save_t5(root / "t5"),
    }


def load(folder: Path, **changes: object) -> TextTeacher:
    spec = TeacherSpec(model=str(folder), **{"length": 20, **changes})
    teacher = load_teacher(spec)
    assert isinstance(teacher, TextTeacher)
    return teacher


def faceted(folder: Path, tmp_path: Path) -> TextTeacher:
    prompts = PromptSet(
        name="two",
        readings=(
            Reading(template='image : "{}" . after', facets=FACETS, begin_facets=True),
            Reading(template="{}", facets=FACETS[:1], sentence=True),
        ),
    )
    path = tmp_path / "two.yaml"
    path.write_text(prompts.model_dump_json())
    return load(folder, prompts=str(path), pooling="last")


@cache
def whole(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    model = AutoModel.from_pretrained(folder).double().eval()
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def naive(folder: Path, text: str, *, layer: int = -1, pooling: str = "mean") -> Tensor:
    """One text, no padding, no mask, all blocks, float64."""
    model, tokenizer = whole(folder)
    ids = tokenizer(text, truncation=True, max_length=20, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    states = (output.last_hidden_state if layer == -1 else output.hidden_states[layer])[0]
    vector = {"mean": states.mean(0), "last": states[-1], "cls": states[0]}[pooling]
    return vector / vector.norm()


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
@pytest.mark.parametrize(
    ("layer", "pooling"), [(-1, "mean"), (-1, "last"), (1, "mean"), (2, "last"), (2, "cls")]
)
def test_vectors_are_those_of_a_full_forward_pass_of_one_text(folders, kind, layer, pooling):
    teacher = load(folders[kind], layer=layer, pooling=pooling)
    texts = [*CAPTIONS[:6], " ".join(CAPTIONS), CAPTIONS[0]]
    found = teacher.encode_texts(texts)
    assert found.shape == (8, 1, DIM)
    for text, vector in zip(texts, found[:, 0], strict=True):
        expected = naive(folders[kind], text, layer=layer, pooling=pooling)
        assert (vector.double() - expected).abs().max() < 1e-5
    assert torch.equal(found[0], found[-1])


def test_blocks_above_the_layer_are_gone(folders):
    teacher = load(folders["llama"], layer=2)
    assert len(teacher.states.model.layers) == 2
    with pytest.raises(ConfigError, match="it has blocks 1 to 4, or -1"):
        load(folders["llama"], layer=5)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_a_vector_does_not_depend_on_what_it_is_batched_with(folders, kind):
    texts = [*CAPTIONS[:20], " ".join(CAPTIONS[:9])]
    teacher = load(folders[kind])
    together = teacher.encode_texts(texts)
    small = load(folders[kind], batch_tokens=30).encode_texts(texts)
    assert (small - together).abs().max() < 1e-5
    alone = torch.cat([teacher.encode_texts([text]) for text in texts])
    assert (alone - together).abs().max() < 1e-5
    assert (teacher.encode_texts(texts[::-1]).flip(0) - together).abs().max() < 1e-5
    assert teacher.encode_texts([]).shape == (0, 1, DIM)


@pytest.mark.heavy
def test_facets_in_one_pass_are_what_separate_passes_give(folders, tmp_path):
    teacher = faceted(folders["llama"], tmp_path)
    assert teacher.packs
    items = [(text, text) for text in [*CAPTIONS[:12], " ".join(CAPTIONS[:5])]]
    found = teacher.encode(items)
    assert found.shape == (13, 3, DIM)
    assert teacher.identity.vectors == 3
    model, words = whole(folders["llama"])
    for (text, _), vectors in zip(items, found, strict=True):
        first = f'image : "{text}" . after'
        rows = [
            [
                *words(first)["input_ids"],
                2,
                *words(FACETS[0], add_special_tokens=False)["input_ids"],
            ],
            [*words(first)["input_ids"], *words(FACETS[1], add_special_tokens=False)["input_ids"]],
            [
                *words(as_sentence(text))["input_ids"],
                *words(FACETS[0], add_special_tokens=False)["input_ids"],
            ],
        ]
        for row, vector in zip(rows, vectors, strict=True):
            with torch.no_grad():
                state = model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
            assert (vector.double() - state / state.norm()).abs().max() < 1e-5
    teacher.packs = False
    assert (teacher.encode(items) - found).abs().max() < 1e-5


@pytest.mark.heavy
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_facets_are_packed_unless_the_model_ignores_mask_or_positions(folders, precision):
    """Rounding must not be taken for another attention, nor another attention for rounding."""
    settings = {"prompts": "flame-long", "pooling": "last", "precision": precision}
    teacher = load(folders["llama"], **settings)
    assert teacher.packs
    forward = teacher.states.model.forward

    def without(name: str) -> Callable[..., object]:
        def changed(input_ids=None, attention_mask=None, position_ids=None):
            given = {"attention_mask": attention_mask, "position_ids": position_ids}
            return forward(input_ids=input_ids, **{**given, name: None})

        return changed

    for ignored in ("attention_mask", "position_ids"):
        teacher.states.model.forward = without(ignored)
        assert not teacher._obeys_masks(), ignored


@pytest.mark.heavy
def test_a_model_that_has_no_positions_to_set_gets_its_facets_one_by_one(folders, tmp_path):
    teacher = faceted(folders["t5"], tmp_path)
    assert not teacher.packs
    assert teacher.encode([(CAPTIONS[0], CAPTIONS[1])]).shape == (1, 3, DIM)
    assert teacher.identity.mask == "padding"


@pytest.mark.heavy
def test_a_long_caption_is_cut_but_never_the_prompt_behind_it(folders, tmp_path):
    teacher = faceted(folders["llama"], tmp_path)
    long, longer = " ".join(CAPTIONS[:20]), " ".join(CAPTIONS[:40])
    assert torch.equal(teacher.encode([(long, long)]), teacher.encode([(longer, longer)]))
    other = " ".join(CAPTIONS[30:50])
    assert not torch.allclose(teacher.encode([(long, long)]), teacher.encode([(other, other)]))


def test_facets_are_read_at_their_last_token_only(folders):
    with pytest.raises(ConfigError, match="set pooling=last"):
        load(folders["llama"], prompts="flame")
    assert load(folders["llama"], prompts="flame", pooling="last").identity.vectors == 11


class Hungry(nn.Module):
    """A model that really asks for a petabyte when a batch holds more than four rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.most = 0

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        if len(input_ids) > 4:
            torch.empty(2**50)
        self.most = max(self.most, len(input_ids))
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.heavy
def test_a_batch_that_does_not_fit_shrinks_and_changes_nothing(folders):
    plain = load(folders["bert"])
    expected = plain.encode_texts(CAPTIONS)
    plain.states.model = hungry = Hungry(plain.states.model)
    assert (plain.encode_texts(CAPTIONS) - expected).abs().max() < 1e-5
    assert hungry.most == 4
    assert plain.budget.tokens < 8192

    def never(batch: list[int]) -> Tensor:
        return torch.empty(2**50)

    with pytest.raises(DataError, match="does not fit in memory"):
        Budget(64).run([3, 4], never)

    def broken(batch: list[int]) -> Tensor:
        raise RuntimeError("another mistake")

    with pytest.raises(RuntimeError, match="another mistake"):
        Budget(64).run([3, 4], broken)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
def test_batches_hold_every_text_once_within_their_budget(lengths, max_tokens):
    batches = list(length_batches(lengths, max_tokens=max_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens


@pytest.mark.heavy
def test_its_identity_changes_with_all_that_decides_its_vectors(folders, tmp_path):
    base = load(folders["llama"]).identity
    changes = {
        "length": ({"length": 21}, {"pooling"}),
        "pooling": ({"pooling": "last"}, {"pooling"}),
        "norm": ({"unit_norm": False}, {"pooling"}),
        "layer": ({"layer": 3}, {"layer"}),
        "fields": ({"fields": ("long,txt",)}, {"reads"}),
        "two": ({"fields": ("long", "txt")}, {"reads", "prompts", "vectors"}),
        "precision": ({"precision": "bfloat16"}, {"compute"}),
        "prompts": (
            {"prompts": "flame", "pooling": "last"},
            {"prompts", "pooling", "vectors", "reads", "mask"},
        ),
    }
    for name, (change, expected) in changes.items():
        found = load(folders["llama"], **change).identity.model_dump()
        differing = {key for key, value in base.model_dump().items() if found[key] != value}
        assert differing == expected, name
    other = tmp_path / "llama"
    other.mkdir()
    for path in folders["llama"].iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert load(other).identity == base
    model = AutoModel.from_pretrained(other)
    model.embed_tokens.weight.data += 1e-3
    model.save_pretrained(other)
    assert load(other).identity.model != base.model


def hashed(teacher: TextTeacher) -> str:
    values = teacher.states.model.state_dict().values()
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()


def build(comm: Comm, folder: Path, spec: str, out: str) -> tuple[int, bool]:
    teacher = load(folder)
    before = hashed(teacher)
    done = embed(spec, out, teacher=teacher, comm=comm)
    return done.computed, hashed(teacher) == before


@pytest.mark.slow
def test_one_two_and_four_ranks_write_the_same_store_and_leave_the_model_as_it_is(
    folders, tmp_path
):
    spec = write_shards(tmp_path / "shards", count=45, per_shard=6)
    contents = []
    for world_size in (1, 2, 4):
        out = tmp_path / f"store{world_size}"
        if world_size == 1:
            found = [build(Comm.solo(), folders["llama"], spec, str(out))]
        else:
            found = run_ranks(build, world_size, folders["llama"], spec, str(out))
        assert found == [(8, True)] * world_size
        contents.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 9


@pytest.mark.heavy
def test_captions_end_up_in_a_store_as_they_are_live(folders, tmp_path):
    spec = write_shards(tmp_path / "shards", count=30, per_shard=10)
    teacher = load(folders["bert"])
    done = embed(spec, tmp_path / "store", teacher=teacher, comm=Comm.solo())
    assert (done.shards, done.computed, done.skipped) == (3, 3, 0)
    assert done.checked >= 3
    store = EmbeddingStore.open(tmp_path / "store")
    expected = teacher.encode_texts([record["name"] for record in read_pairs(30)])[:, 0]
    assert (store.rows(torch.from_numpy(store.ids)) - expected).abs().max() < 1e-3
    assert embed(spec, tmp_path / "store", teacher=teacher, comm=Comm.solo()).already_done


def test_a_spec_is_read_from_names_folders_and_files(folders, tmp_path):
    assert read_spec("minilm").name == "all-MiniLM-L6-v2"
    assert read_spec("efficientnet-lite0").kind == "image"
    path = tmp_path / "t.yaml"
    path.write_text("model: smollm2\nlayer: 20\npooling: last\n")
    spec = read_spec(str(path), ["layer=21", "fields=[txt, 'long,txt']"])
    assert (spec.name, spec.layer, spec.pooling) == ("SmolLM2-135M-Instruct", 21, "last")
    assert spec.fields == ("txt", "long,txt")
    for change, message in (
        ("layers=3", "layers: there is no such key; did you mean 'layer'"),
        ("layer", "has no '='"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_spec(str(path), [change])
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_teacher(read_spec(str(tmp_path)))
    with pytest.raises(ConfigError, match="can't read the teacher"):
        read_spec(str(tmp_path / "none.yaml"))
    assert load_prompts("flame").num_vectors == 11
    with pytest.raises(ConfigError, match="there are flame, flame-long, plain"):
        load_prompts("nothing")


def test_texts_are_read_by_field_with_alternatives():
    fields = {"txt": b" red  apple ", "json": b'{"keywords": ["fruit", "red"], "long": "A fruit?"}'}
    prompts = load_prompts("plain").with_fields(["keywords", "short,long", "txt"])
    assert prompts.texts(fields) == ("fruit, red", "A fruit?", "red apple")
    assert prompts.num_vectors == 3
    flame = load_prompts("flame").with_fields(["txt", "short,txt", "long,txt"])
    raw, short, long = flame.readings
    assert flame.texts(fields) == ("red apple", "red apple", "A fruit?")
    assert long.prompt("A fruit?") == (
        'Detailed Image description : "A fruit." . After thinking step by step ,'
    )
    assert (raw.num_vectors, short.num_vectors, long.num_vectors) == (1, 3, 7)
    assert [facet.startswith(" th") for facet in long.facets] == [True] * 7
    with pytest.raises(ConfigError, match="have 3 readings, but fields are given for 2"):
        load_prompts("flame").with_fields(["txt", "long"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a dog", "a dog."), ("a dog.", "a dog."), ("a dog?", "a dog."), ('say "hi"', "say 'hi'")],
)
def test_sentences_end_with_a_stop_and_hold_no_double_quotes(text, expected):
    assert as_sentence(text) == expected
