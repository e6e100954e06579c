"""English plurals to singulars, by rule and by table. Twice is once: a singular stays itself."""

from __future__ import annotations

_PAIRS = """
children child, men man, women woman, feet foot, teeth tooth, geese goose, mice mouse, lice louse,
oxen ox, knives knife, wolves wolf, leaves leaf, shelves shelf, calves calf, halves half,
loaves loaf, thieves thief, wives wife, lives life, scarves scarf, hooves hoof, elves elf,
selves self, cacti cactus, fungi fungus, buses bus, gases gas, lenses lens, viruses virus,
bonuses bonus, quizzes quiz, potatoes potato, tomatoes tomato, heroes hero, echoes echo,
mangoes mango, volcanoes volcano, mosquitoes mosquito, torpedoes torpedo, buffaloes buffalo,
tornadoes tornado, dominoes domino, movies movie, cookies cookie, zombies zombie, brownies brownie,
hoodies hoodie, selfies selfie, smoothies smoothie, rookies rookie, genies genie, pies pie,
ties tie, lies lie, calories calorie, caches cache, headaches headache, toothaches toothache,
moustaches moustache, mustaches mustache, quiches quiche, avalanches avalanche, niches niche,
axes axe
"""
_ALONE = """
lens species series news gas bus yes has this his always atlas christmas canvas mars paris
specimen abdomen omen semen acumen regimen amen yemen ramen hymen stamen lumen cyclamen
"""
_IRREGULAR: dict[str, str] = dict(pair.split() for pair in _PAIRS.split(","))
_SINGULAR = frozenset(_ALONE.split())
_SHORTEST = 4
"""Letters of the shortest word that a rule changes."""


def singular(word: str) -> str:
    """The singular of a lower-case English noun; of anything else, one form for all its forms."""
    while (shorter := _once(word)) != word:
        word = shorter
    return word


def _once(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < _SHORTEST or word in _SINGULAR:
        return word
    if word.endswith("men"):
        return f"{word[:-3]}man"
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return f"{word[:-3]}y"
    if word.endswith(("sses", "shes", "ches", "xes")) or _has_latin_plural(word):
        return word[:-2]
    return word[:-1]


def _has_latin_plural(word: str) -> bool:
    """`octopuses`, but not `houses`, `causes` and `muses`."""
    return len(word) > 7 and word.endswith("uses") and not word.endswith(("ouses", "auses"))
