"""Parts of messages: the nearest known word, and a number with its noun."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, or all of them.

    Args:
        word: the unknown word.
        known: the words that are allowed.

    Returns:
        `did you mean 'timesteps'?`, or `expected one of a, b`.
    """
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"expected one of {', '.join(names)}" if names else "none is defined"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun in the singular or the plural: `1 epoch`, `2 epochs`.

    Args:
        number: how many.
        noun: the singular.
        plural: the plural, where it is not the singular with an s.
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
