"""What the samples of shards are, found out once, and which of them are worth training on."""
