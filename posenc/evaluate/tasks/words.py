"""Words for generated tasks: the same on every machine, and without a download."""

from __future__ import annotations

import numpy as np


def _words(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())


ADJECTIVES = _words(
    "amber ancient bitter bold brave bright broken calm clever cold coral crimson crooked curious damp dark deep "
    "distant dusty eager early empty faint famous fierce foggy frozen gentle golden grand green hidden hollow humble "
    "icy idle jolly keen late lonely loud lucky mellow modest narrow noble odd pale patient plain polite proud quick "
    "quiet rapid rare royal rusty sharp shy silent silver simple sleepy smooth solid steady strange sturdy sudden "
    "sunny tame tidy tiny vivid warm wide wild wise young"
)
NOUNS = _words(
    "acorn anchor apple arrow badger barrel basket beacon bell bottle branch bridge bucket butter button candle canyon "
    "castle cellar cherry circle cloud comet copper corner cradle cricket crystal desert dragon falcon feather fiddle "
    "forest fountain garden glacier hammer harbor hazel helmet honey island jacket kettle ladder lantern lemon lizard "
    "magnet maple marble meadow mirror monkey needle orchard otter paddle parrot pebble pencil pepper pigeon pillow "
    "planet pocket puzzle rabbit raven ribbon river rocket saddle sailor shadow sparrow spider temple thunder tiger "
    "timber tunnel turtle valley velvet violin walnut whistle willow window winter"
)
THINGS = (
    "pass key", "door code", "phone number", "ticket number", "room number", "account number", "flight number",
    "zip code", "prize money", "license plate", "locker combination", "serial number", "invoice total",
    "page count", "crowd size", "meter reading", "parcel label", "train number", "sample weight", "radio frequency",
)  # fmt: skip
"""What a number can be: alike in nothing, so that even a small model tells them apart."""
_ONSETS = _words("b c d f g h j k l m n p r s t v w z br cl dr fl gr pl st tr")
_VOWELS = _words("a e i o u ai ea oo")
_CODAS = ["", "", "n", "r", "l", "m", "s", "t", "nd", "rk"]


def phrases(rng: np.random.Generator, count: int) -> list[str]:
    """Different names such as ``amber-harbor``."""
    chosen = rng.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False)
    return [f"{ADJECTIVES[pick // len(NOUNS)]}-{NOUNS[pick % len(NOUNS)]}" for pick in chosen]


def things(rng: np.random.Generator, count: int) -> list[str]:
    """Different ones of `THINGS`."""
    return [THINGS[pick] for pick in rng.choice(len(THINGS), count, replace=False)]


def numbers(rng: np.random.Generator, count: int, digits: int) -> list[str]:
    """Different numbers of exactly so many digits."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[str(rng.integers(10 ** (digits - 1), 10**digits))] = None
    return list(found)


def made_up(rng: np.random.Generator, count: int) -> list[str]:
    """Different pronounceable words that no dictionary has (or few do)."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = int(rng.integers(2, 4))
        parts = [rng.choice(part) for _ in range(syllables) for part in (_ONSETS, _VOWELS, _CODAS)]
        found["".join(map(str, parts))] = None
    return list(found)


def letters(rng: np.random.Generator, count: int, size: int) -> list[str]:
    """Different names of `size` capital letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(chr(65 + int(letter)) for letter in rng.integers(0, 26, size))] = None
    return list(found)
