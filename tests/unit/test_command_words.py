"""The command line itself: what overrides of a search mean, what an interruption prints."""

from __future__ import annotations

import sys

import pytest

from spikefleet.cli.tuning import resumable, split_overrides
from spikefleet.errors import UserError


def test_where_data_lie_is_no_part_of_what_a_search_is() -> None:
    fixed, data = split_overrides(["data.root=/data/cifar", "optim.lr=0.1", 'data.options={"train": 5}'])
    assert fixed == {"optim.lr": 0.1, "data.options": {"train": 5}}
    assert data == {"data.root": "/data/cifar"}
    with pytest.raises(UserError, match=r"'optim.lr' is not of the form section.key=value"):
        split_overrides(["optim.lr"])


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("extension", [["--extend", "20"], ["--extend=20"], []])
def test_the_command_to_resume_with_extends_once(
    extension: list[str], noted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["spikefleet", "tune", "digits", *extension, "--confirm", "3"])
    with pytest.raises(KeyboardInterrupt), resumable(lambda: noted):
        raise KeyboardInterrupt
    said = " ".join(capsys.readouterr().err.split())
    words = ["tune", "digits", *([] if noted else extension), "--confirm", "3"]
    assert said == f"interrupted; resume with: spikefleet {' '.join(words)}"
