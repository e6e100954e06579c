"""What `tools/bench.py` runs: ratios measured in one process, never absolute claims."""
