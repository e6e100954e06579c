"""Frozen teachers: models that give samples their vectors once, before training."""
