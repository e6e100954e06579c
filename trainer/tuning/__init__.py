"""Classifiers on stored features: linear probes, a small network, and NMTune's regularisers.

Chen et al., "Understanding and Mitigating the Label Noise in Pre-training on Downstream Tasks",
arXiv 2309.17002. No encoder runs here: features come from embedding stores.
"""
