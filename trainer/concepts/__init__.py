"""Which concepts captions and images name, how often, and whether that decides what is learnt.

Udandarao et al., "No Zero-Shot Without Exponential Data", arXiv 2404.04125. `Matcher` finds a
bank's concepts in captions, `Counts` are sums over shards, `trend` relates them to accuracy.
"""

from trainer.concepts.bank import Bank, Concept
from trainer.concepts.counts import Counts
from trainer.concepts.matcher import Matcher
from trainer.concepts.words import Lemmas, words_of

__all__ = ["Bank", "Concept", "Counts", "Lemmas", "Matcher", "words_of"]
