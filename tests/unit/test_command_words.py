"""The command line itself: what overrides of a search mean, what an interruption prints."""

from __future__ import annotations

import sys

import pytest
import typer
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.cli.app import _ORDER
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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("train digits --workers two", "'--workers': 'two' must be a number of workers, or MIN:MAX"),
        ("tune digits_t_gate_schedule --workers two", "'--workers': 'two': must be a valid integer"),
        ("data prepare digits --seed -1", "'--seed': '-1': must be greater than or equal to 0"),
        ("evaluate run --split tets", "'--split': 'tets' is not one of 'train', 'val', 'test'"),
    ],
)
def test_an_invalid_value_is_named_with_its_rule(words: str, sentence: str) -> None:
    with pytest.raises(typer.BadParameter) as refused:
        typer.main.get_command(app).main(words.split(), prog_name="spikefleet", standalone_mode=False)
    assert refused.value.exit_code == 2
    assert refused.value.format_message() == f"Invalid value for {sentence}"


def test_the_help_has_the_commands_in_the_order_of_use_and_its_paragraphs_in_one_piece() -> None:
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    context = command.make_context("spikefleet", ["recipes"])
    names = command.list_commands(context)
    assert names[:4] == ["recipes", "config", "data", "train"]
    assert sorted(names) == sorted(command.commands)
    assert set(names) == set(_ORDER)
    spike_check = command.get_command(context, "spike-check")
    assert [part.count("\n") for part in spike_check.help.split("\n\n")] == [0, 0]


def test_the_help_of_an_export_names_the_extra_that_it_needs() -> None:
    """Square brackets are markup of the help, which leaves unknown ones out."""
    shown = CliRunner().invoke(app, ["registry", "export", "--help"]).output
    assert "spikefleet[export]" in shown.replace("\n", "")
