"""Streamed sums over more rows than a batch-by-rows matrix would fit."""
