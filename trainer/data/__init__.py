"""From shards to batches: exact order, named damage, randomness by sample id."""
