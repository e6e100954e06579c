"""A frozen language model as teacher: texts in, pooled states of one layer out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from trainer.data.shards import RawSample
from trainer.data.tokenize import pad_ids, token_ids
from trainer.errors import ConfigError
from trainer.models.pooling import Pooling, pooled
from trainer.store import Identity
from trainer.teachers.batches import Budget
from trainer.teachers.facets import Packed, at_readout, facet_inputs, pack
from trainer.teachers.frozen import FrozenStates, Precision, Shard
from trainer.teachers.prompts import PromptSet, Reading

Rows = list[list[int]]
_PROBE = "a red apple on a table"


class TextTeacher:
    """Vectors of a sample's texts: of each reading one, or one for each of its facets.

    A vector depends on its own text alone, whatever it is batched with (to rounding). Facets are
    computed in one pass where the model obeys a mask, which is tried once, else one by one.
    """

    chunk: int | None = None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        prompts: PromptSet,
        *,
        name: str,
        hashes: tuple[str, str],
        pooling: Pooling | Literal["own"] = "mean",
        layer: int = -1,
        length: int = 256,
        unit_norm: bool = True,
        precision: Precision = "float32",
        batch_tokens: int = 8192,
        shard: Shard | None = None,
        dim: int | None = None,
        maps: nn.Module | None = None,
        lowercase: bool = False,
        settings: str = "not recorded",
        note: str = "",
    ) -> None:
        self.states, self.tokenizer = FrozenStates(model, layer=layer, shard=shard), tokenizer
        self.prompts, self.name, self.hashes = prompts, name, hashes
        self.pooling, self.layer, self.length = pooling, layer, length
        self.unit_norm, self.precision = unit_norm, precision
        self.maps, self.lowercase = maps, lowercase
        """What follows the pooling; and whether texts are read in lower case."""
        self.settings, self.note = settings, note
        self.budget = Budget(batch_tokens, shared=shard is not None)
        if self._faceted() and pooling != "last":
            raise ConfigError(
                f"prompts {prompts.name} have facets, which are read at their last token; "
                f"pooling is {pooling}, set pooling=last"
            )
        self.dim = dim or int(model.config.hidden_size)  # type: ignore[arg-type, union-attr]
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        self.device = torch.device("cpu") if device.type == "meta" else device  # kept on the disk
        self.packs = bool(self._faceted()) and self._obeys_masks()

    @property
    def identity(self) -> Identity:
        norm = ", unit norm" if self.unit_norm else ""
        return Identity(
            teacher=self.name,
            model=self.hashes[0],
            tokenizer=self.hashes[1],
            reads=self.prompts.reads,
            prompts=self.prompts.digest,
            pooling=f"{self.pooling} of {self.length} tokens at most{norm}",
            mask="padding, other facets" if self.packs else "padding",
            layer=self.layer,
            compute=self.precision,
            vectors=self.prompts.num_vectors,
            dim=self.dim,
            settings=self.settings,
        )

    def read(self, sample: RawSample) -> tuple[str, ...]:
        return self.prompts.texts(sample.fields)

    def encode(self, items: Sequence[tuple[str, ...]]) -> Float32[Tensor, "samples vectors dim"]:
        """The vectors of samples, each given as the texts of its readings."""
        parts = [
            self.encode_texts([item[number] for item in items], reading)
            for number, reading in enumerate(self.prompts.readings)
        ]
        return torch.cat(parts, dim=1)

    @torch.inference_mode()
    def stand_by(self) -> None:
        one = torch.ones(1, 1, dtype=torch.int64, device=self.device)
        self.states.stand_by(input_ids=one, attention_mask=one)

    @torch.inference_mode()
    def encode_texts(
        self, texts: Sequence[str], reading: Reading | None = None
    ) -> Float32[Tensor, "texts vectors dim"]:
        """The vectors of one reading, on the CPU. Equal texts are computed once."""
        reading = reading or self.prompts.readings[0]
        unique = list(dict.fromkeys(texts))
        if not unique:
            return torch.empty(0, reading.num_vectors, self.dim)
        given = [text.lower() for text in unique] if self.lowercase else unique
        prompts = [reading.prompt(text) for text in self._cut(given, reading)]
        facets = self._facet_ids(reading)
        if not facets:
            found = self._one_by_one(self._ids(prompts), [[]])
        elif self.packs:
            found = self._packed(self._prefixes(prompts), facets)
        else:
            found = self._one_by_one(self._prefixes(prompts), facets)
        if self.maps is not None:
            found = self.maps(found)
        if self.unit_norm:
            found = nn.functional.normalize(found, dim=-1)
        place = {text: row for row, text in enumerate(unique)}
        return found[[place[text] for text in texts]]

    def _packed(self, prefixes: Rows, facets: Rows) -> Tensor:
        tail = sum(map(len, facets))

        def compute(batch: list[int]) -> Tensor:
            rows = pack([prefixes[index] for index in batch], facets, pad=self._pad)
            rows = rows.to(self.device)
            states = self.states(**facet_inputs(rows, self.states.model.dtype))  # type: ignore[arg-type]
            return at_readout(states, rows).float()

        return self.budget.run([len(prefix) + tail for prefix in prefixes], compute)

    def _one_by_one(self, prefixes: Rows, facets: Rows) -> Tensor:
        parts = [self._pooled([prefix + facet for prefix in prefixes]) for facet in facets]
        return torch.cat(parts, dim=1)

    def _pooled(self, rows: Rows) -> Tensor:
        how = self.pooling

        def compute(batch: list[int]) -> Tensor:
            wanted = [rows[index] for index in batch]
            tokens, mask = pad_ids(wanted, self._pad, max(map(len, wanted)))
            tokens, mask = tokens.to(self.device), mask.to(self.device)
            if how == "own":  # the model makes vectors by itself
                return self.states.model(tokens, mask)[:, None]  # type: ignore[no-any-return]
            states = self.states(input_ids=tokens, attention_mask=mask.long())
            return pooled(states, mask.to(states.device), how)[:, None]

        return self.budget.run([len(row) for row in rows], compute)

    @property
    def _pad(self) -> int:
        pad: int = self.tokenizer.pad_token_id
        return pad

    def _ids(self, texts: Sequence[str]) -> Rows:
        return token_ids(self.tokenizer, texts, length=self.length)

    def _prefixes(self, prompts: Sequence[str]) -> Rows:
        """Prompts that a facet follows: they begin as the model's texts do, but do not end."""
        begin = self._begin()
        plain = self.tokenizer(list(prompts), add_special_tokens=False, split_special_tokens=True)
        return [begin + ids for ids in plain["input_ids"]]

    def _facet_ids(self, reading: Reading) -> Rows:
        if not reading.facets:
            return []
        ids: Rows = self.tokenizer(list(reading.facets), add_special_tokens=False)["input_ids"]
        if reading.begin_facets:
            ids[0] = self._begin() + ids[0]
        return ids

    def _begin(self) -> list[int]:
        """The token that texts of this model begin with, if there is one."""
        begin = self.tokenizer.bos_token_id
        starts = self.tokenizer("a")["input_ids"][0] == begin
        return [begin] if begin is not None and starts else []

    def _cut(self, texts: list[str], reading: Reading) -> list[str]:
        """Texts that leave room for the template: never cut in a prompt or a facet.

        Where a template has facets, `length` is the text's own tokens; else the whole prompt's.
        """
        if reading.prompt("") == "":
            return texts
        rows = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            truncation=True,
            max_length=self.length,
            return_offsets_mapping=True,
        )["offset_mapping"]
        cut = [text[: row[-1][1]] if row else text for text, row in zip(texts, rows, strict=True)]
        if reading.facets:
            return cut
        return [self._with_room(text, row, reading) for text, row in zip(cut, rows, strict=True)]

    def _with_room(self, text: str, row: Sequence[tuple[int, int]], reading: Reading) -> str:
        """The longest beginning of a text whose whole prompt has at most `length` tokens."""
        kept = len(row)
        while (over := self._tokens(reading.prompt(text)) - self.length) > 0:
            if kept == 0:
                raise ConfigError(
                    f"the template {reading.template!r} of prompts {self.prompts.name} has "
                    f"{self.length + over} tokens by itself, but length is {self.length}"
                )
            kept = max(0, kept - over)
            text = text[: row[kept - 1][1]] if kept else ""
        return text

    def _tokens(self, prompt: str) -> int:
        return len(self.tokenizer(prompt, split_special_tokens=True)["input_ids"])

    def _faceted(self) -> list[Reading]:
        return [reading for reading in self.prompts.readings if reading.facets]

    def _obeys_masks(self) -> bool:
        """Whether packed facets are what separate passes give, on a probe.

        Rounding grows with the blocks and in bfloat16 it passes any fixed tolerance, so what
        counts is to be nearer to separate passes than to a pass that ignores mask or positions.
        """
        model = self.states.model
        window = getattr(model.config, "sliding_window", None)
        if "position_ids" not in inspect.signature(model.forward).parameters or window:
            return False
        reading = max(self._faceted(), key=lambda reading: reading.num_vectors)
        prefixes = self._prefixes([reading.prompt(_PROBE)])
        facets = self._facet_ids(reading) * 2
        rows = pack(prefixes, facets, pad=self._pad).to(self.device)
        with torch.inference_mode():
            try:
                packed = self._at_last_facet(rows)
                wrong = [self._at_last_facet(rows, causal=True)]
                counted_on = torch.arange(rows.tokens.shape[1], device=self.device)[None]
                wrong += [self._at_last_facet(rows._replace(positions=counted_on))]
            except (ValueError, RuntimeError):
                return False
            apart = self._one_by_one(prefixes, facets[-1:])[:, 0]
        return all(bool((packed - apart).norm() < (packed - other).norm() / 2) for other in wrong)

    def _at_last_facet(self, rows: Packed, *, causal: bool = False) -> Tensor:
        """One packed pass; `causal` lets every facet see those before it."""
        inputs = facet_inputs(rows, self.states.model.dtype)  # type: ignore[arg-type]
        if causal:
            inputs["attention_mask"] = torch.ones_like(rows.tokens)
        return at_readout(self.states(**inputs), rows)[:, -1].float().cpu()
