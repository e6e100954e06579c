"""Sharded k-means, the tables built from clusters, and how good they are."""
