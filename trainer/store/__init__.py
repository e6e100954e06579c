"""The embedding store: vectors of samples on disk, joined to training data by sample id.

A folder with one file per shard of the data, and one header:

    header.json        what the vectors are (model, layer, prompts, tokenizer ...), rows per shard
    <shard>.vectors    a copy of that, then [rows, vectors, dim] in fp16 or int8, then the ids
    building.json      the header while shards are still missing
    pca.safetensors    the projection of the vectors, where they were projected

The shard is the unit of work: a file appears whole, by one rename, or not at all. A build that was
killed goes on with the next shard, and ranks build different shards without talking.
"""

from trainer.store.header import Identity, ShardEntry, StoreHeader
from trainer.store.shard_file import Block
from trainer.store.store import EmbeddingStore
from trainer.store.writer import StoreWriter

__all__ = ["Block", "EmbeddingStore", "Identity", "ShardEntry", "StoreHeader", "StoreWriter"]
