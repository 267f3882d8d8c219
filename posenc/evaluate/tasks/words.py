"""Words for generated tasks: the same on every machine, without a download."""

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
"""Things that a number can belong to, so different that even a small model can tell them apart."""
_ONSETS = _words("b c d f g h j k l m n p r s t v w z br cl dr fl gr pl st tr")
_VOWELS = _words("a e i o u ai ea oo")
_CODAS = ["", "", "n", "r", "l", "m", "s", "t", "nd", "rk"]


def phrases(rng: np.random.Generator, count: int) -> list[str]:
    """Different names such as ``amber-harbor``."""
    chosen = rng.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False)
    return [f"{ADJECTIVES[pick // len(NOUNS)]}-{NOUNS[pick % len(NOUNS)]}" for pick in chosen]


def things(rng: np.random.Generator, count: int) -> list[str]:
    """Different elements of `THINGS`."""
    return [THINGS[pick] for pick in rng.choice(len(THINGS), count, replace=False)]


def numbers(rng: np.random.Generator, count: int, digits: int) -> list[str]:
    """Different numbers with exactly that many digits."""
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen[str(rng.integers(10 ** (digits - 1), 10**digits))] = None
    return list(chosen)


def made_up(rng: np.random.Generator, count: int) -> list[str]:
    """Different pronounceable words that are in few dictionaries, if any."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = int(rng.integers(2, 4))
        parts = [rng.choice(part) for _ in range(syllables) for part in (_ONSETS, _VOWELS, _CODAS)]
        words["".join(map(str, parts))] = None
    return list(words)


def letters(rng: np.random.Generator, count: int, size: int) -> list[str]:
    """Different names of `size` capital letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(chr(65 + int(letter)) for letter in rng.integers(0, 26, size))] = None
    return list(names)
