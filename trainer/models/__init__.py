"""Towers built on transformers modules, and the heads on top of them."""
