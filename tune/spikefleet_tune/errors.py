"""What a user can mend, in one sentence that names what is wrong, where, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SearchError(ValueError):
    """A search that cannot start as it is written or asked for."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known here: {', '.join(names)}" if names else "none is known here"
