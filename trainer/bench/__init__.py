"""What `tools/bench.py` runs: ratios measured in one process, never absolute claims.

A benchmark is a module with `add_options(command)` and `measure_options(options) -> rows`; only the
one that is asked for is imported.
"""

BENCHES = {
    "step": "trainer.bench.step",
    "tokens": "trainer.bench.tokens",
    "data": "trainer.bench.data",
    "scale": "trainer.bench.scale",
    "curation": "trainer.bench.curation",
    "episode": "trainer.bench.episode",
    "kmeans": "trainer.bench.kmeans",
    "prototype-logits": "trainer.bench.prototype_logits",
    "head-step": "trainer.bench.head_step",
    "saves": "trainer.bench.saves",
    "embed": "trainer.bench.embed",
}
