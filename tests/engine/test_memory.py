"""What a rank holds, at its highest, while a model is cut under ZeRO-3 and while it is restored.

Three sizes on two ranks; what grows with the parameters is the slope between the outer two. The
buckets are smaller than the smallest model, since one that holds a whole model grows with it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engine.test_zero import CONFIGS, OPTIM
from tests.models.small import small_batch, small_config, word_tokenizer
from tests.ranks import run_ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.engine.accumulate import accumulate

WIDTH = 256
LAYERS = (2, 5, 8)
BUCKET = 800_000
"""Elements: as many as a block has, which is gathered at once anyway."""


def test_restoring_adds_a_ranks_own_moments_and_no_copy_of_the_model(
    tmp_path: Path,
) -> None:
    """Bytes a parameter of one of two ranks. Once cut: 2 each of weights, of what the optimizer
    updates and of gradients; restoring adds the moments, 4, and no copy of anything."""
    for sizes in run_ranks(cut_and_restored, 2, tmp_path, timeout_seconds=400):
        small, large = sizes[0], sizes[-1]
        more = large["parameters"] - small["parameters"]
        grows = {key: (large[key] - small[key]) / more for key in small if key != "parameters"}
        assert grows["built"] < 4.6, grows
        assert grows["cut"] < 2.5, grows
        assert grows["after"] < 6.5, grows
        assert grows["restoring"] < 4.9, grows
        assert all(size["same"] for size in sizes)


def cut_and_restored(comm: Comm, folder: Path) -> list[dict[str, float]]:
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is given back
    one_size(comm, folder / "warm", 1)
    return [one_size(comm, folder / str(layers), layers) for layers in LAYERS]


def one_size(comm: Comm, folder: Path, layers: int) -> dict[str, float]:
    from trainer.engine.zero import Engine

    def engine_of(model: Any) -> Engine:
        return Engine(model, OPTIM, comm, deepspeed_config=config, micro_batch=2)

    config = with_small_buckets(folder.with_suffix(f".{comm.rank}.json"))
    first, batch = engine_of(model_of(layers)), small_batch(2)
    accumulate(first, loss_of_pairs(comm), [batch])
    assert first.step(1.0)
    saved = {"weights": first.weights_share(), "moments": first.moments_share()}
    checkpoints = Checkpointer(folder, comm)
    checkpoints.save(1, saved, {}, {})
    first._engine.destroy()
    del first
    gc.collect()
    before = resident()
    model = model_of(layers)
    parameters = sum(p.numel() for p in model.parameters())
    built = resident() - before
    with highest() as cut:
        engine = engine_of(model)
    after = resident() - before
    restored = checkpoints.latest()
    assert restored is not None
    comm.barrier()
    with highest() as restoring:
        engine.restore(restored.lazily("weights"), restored.lazily("moments"), 1, batch)
    again = {"weights": engine.weights_share(), "moments": engine.moments_share()}
    same = all(saved[g][n].equal(again[g][n]) for g in saved for n in saved[g])
    engine._engine.destroy()
    return {
        "parameters": parameters,
        "built": built,
        "cut": cut[0] - before - built,
        "after": after,
        "restoring": restoring[0] - before - after,
        "same": same,
    }


def test_a_loaded_tower_costs_a_rank_its_share_and_a_block(tmp_path: Path) -> None:
    """Bytes a parameter of one of two ranks, of a language model in bfloat16: none while it is
    loaded and looked at, where float32 took 4; then what a rank holds once it is cut, 6."""
    for layers in (1, *LAYERS):
        save_half_llama(tmp_path / str(layers), layers)
    for sizes in run_ranks(loaded_and_cut, 2, tmp_path, timeout_seconds=400):
        small, large = sizes[0], sizes[-1]
        more = large["parameters"] - small["parameters"]
        grows = {key: (large[key] - small[key]) / more for key in small if key != "parameters"}
        assert grows["loading"] < 0.6, grows
        assert grows["loaded"] < 0.3, grows
        assert grows["cutting"] < 6.6, grows


def loaded_and_cut(comm: Comm, folder: Path) -> list[dict[str, float]]:
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is given back
    return [loaded_of_size(comm, folder / str(layers)) for layers in (1, *LAYERS)][1:]


def loaded_of_size(comm: Comm, path: Path) -> dict[str, float]:
    from trainer.engine.zero import Engine
    from trainer.models.stored import towers_as_stored
    from trainer.models.two_tower import build_two_tower

    config = with_small_buckets(path.with_suffix(f".{comm.rank}.json"))
    gc.collect()
    before = resident()
    with highest() as loading, towers_as_stored(True):
        text = {"path": str(path), "pooling": "last"}
        model = build_two_tower(small_config(text=text, embed_dim=16), word_tokenizer(), seed=3)
    gc.collect()
    loaded = resident() - before
    parameters = sum(p.numel() for p in model.parameters())
    with highest() as cutting:
        engine = Engine(model, OPTIM, comm, deepspeed_config=config, micro_batch=2)
    accumulate(engine, loss_of_pairs(comm), [small_batch(2)])
    assert engine.step(1.0)
    engine._engine.destroy()
    return {
        "parameters": parameters,
        "loading": loading[0] - before,
        "loaded": loaded,
        "cutting": cutting[0] - before,
    }


def save_half_llama(path: Path, layers: int) -> None:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
    vocabulary = {"vocab_size": len(word_tokenizer()), "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **vocabulary, num_hidden_layers=layers)
    LlamaModel(config).bfloat16().save_pretrained(path)


def with_small_buckets(path: Path) -> Path:
    values = json.loads((CONFIGS / "zero3.json").read_text())
    few = dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_max_live_parameters"), BUCKET)
    values["zero_optimization"] |= few | {"reduce_bucket_size": BUCKET}
    path.write_text(json.dumps(values))
    return path


def model_of(layers: int) -> Any:
    from trainer.models.two_tower import build_two_tower

    tower = {"width": WIDTH, "layers": layers, "heads": 4}
    return build_two_tower(small_config(image=tower, text=tower), word_tokenizer(), seed=3)


def loss_of_pairs(comm: Comm) -> Callable[..., Any]:
    from tests.engine.test_llm_tower import loss_of as pairs

    return pairs(comm)


def resident() -> int:
    """Bytes of this process's own memory; pages of mapped files are the system's."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def highest() -> Iterator[list[int]]:
    """The most that was resident within it, looked at every millisecond or two."""
    found, over = [resident()], threading.Event()

    def look() -> None:
        while not over.wait(0.001):
            found[0] = max(found[0], resident())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
