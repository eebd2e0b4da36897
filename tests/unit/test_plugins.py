"""Plugins that are no modules, that fail, or that a damaged record names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spikefleet.config.recipes import parse_model
from spikefleet.errors import UserError
from spikefleet.plugins import VARIABLE, load_plugins, loaded_plugins, missing_plugins_named


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit(0)", "cannot be loaded: SystemExit: 0"),
        ("raise OSError('no licence')", "cannot be loaded: OSError: no licence"),
        ("def (:", "cannot be loaded: SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_a_plugin_that_fails_is_named_and_not_taken_for_loaded(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fails_when_imported.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    for _ in range(2):
        with pytest.raises(UserError, match=said):
            load_plugins(["fails_when_imported"])
    assert "fails_when_imported" not in loaded_plugins()


@pytest.mark.parametrize("name", ["a b", "../a", "a/b", "a:b", "a,b", "a..b", "a.", "1a", "\u00e4"])
def test_a_name_that_is_no_module_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UserError, match="must be the name of a module"):
        load_plugins([name])


def read_an_unknown_family(recorded: Any) -> None:
    with missing_plugins_named(recorded, "run r"):
        parse_model({"family": "from_a_plugin"}, "run r")


@pytest.mark.parametrize("recorded", [None, "abc", 3, {"a": 1}, [1]])
def test_a_damaged_record_of_plugins_is_named(recorded: Any) -> None:
    with pytest.raises(UserError, match=r"not 'from_a_plugin'.*; run r is damaged: its plugins are"):
        read_an_unknown_family(recorded)


def test_plugins_that_are_missing_are_named_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"not 'from_a_plugin'.*; run r was trained with plugin a, b.*=a,b"):
        read_an_unknown_family(["a", "b"])
    with pytest.raises(UserError, match=r"not 'from_a_plugin' [^;]*$"):
        read_an_unknown_family([])


def test_a_plugin_that_was_only_installed_is_not_missed() -> None:
    with missing_plugins_named(["elsewhere"], "run r"):
        parse_model({"family": "sg_resnet"}, "run r")
