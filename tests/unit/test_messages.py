"""Parts of messages: number and noun agree, and an unknown word gets the nearest known one."""

from __future__ import annotations

import pytest

from spikefleet_tune.messages import counted, nearest, one_of


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (0, ("epoch",), "0 epochs"),
        (1, ("epoch",), "1 epoch"),
        (2, ("epoch",), "2 epochs"),
        (1, ("class", "classes"), "1 class"),
        (10, ("class", "classes"), "10 classes"),
    ],
)
def test_number_and_noun_agree(number: int, words: tuple[str, ...], text: str) -> None:
    assert counted(number, *words) == text


def test_an_unknown_word_gets_the_nearest_known_one_or_all() -> None:
    assert nearest("timestep", ["bound", "timesteps"]) == "did you mean 'timesteps'?"
    assert nearest("zebra", ["timesteps", "bound"]) == "expected one of bound, timesteps"
    assert nearest("zebra", []) == one_of([]) == "none exist"
