"""What a run will cost before it is started: memory, traffic, arithmetic, hours."""
