"""Random text as recipes, searches and overrides: a configuration or a sentence, never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from robustness.damage import damaged, seeds, write_new
from spikefleet.config.recipes import load_config, parse_overrides, recipe_header
from spikefleet.config.strict_yaml import dump_yaml, parse_yaml
from spikefleet.errors import UserError
from spikefleet.search.search_files import parse_search

RECIPE = """\
base: digits
model:
  timesteps: 2
  stages: [1, 1]
data: {source: digits, root: "/x/my set #2"}
train:
  epochs: 3
  seed: 010
optim: {lr: 1e-3, milestones: [], nesterov: true}
"""
SEARCH = """\
recipe: digits
overrides: {train.epochs: 1}
space:
  model.timesteps: {choice: [1, 2]}
  optim.lr: {log_uniform: [1e-3, 0.1]}
objectives: {val/top1: max}
budget: {trials: 3}
"""
_KEYS = (
    "train.seed", "model.timesteps", "model.width", "model.stages", "optim.lr", "optim.nesterov", "data.root", "model",
    "optim.milestones", "train", "data.options.upsample", "registry.name", "tracking.experiment", "checkpoint.metric",
    "data.transform", "shortcut.where", "task",
)  # fmt: skip
_VALUES = (
    "", "0", "-1", "010", "1e30", "1e-300", "99999999999999999999999", ".inf", ".nan", "true", "yes", "null", "[1, 2]",
    "[]", "{}", '{"a": 1}', '["a", null]', '"text"', "a\x00b", "\x1b[31m", "a\nb", "猫", "[" * 60 + "]" * 60, "!!int 3",
    "%s", "{0}", "../..", "\ud800", "0x1F", "1:30", "2026-01-01", "a" * 5000, "[true]", '{"family": "x"}', "-0", "1e5",
)  # fmt: skip


def failure(do: Callable[[], object]) -> str | None:
    """None where something was read or refused with a sentence; else the traceback's error."""
    try:
        do()
    except UserError as error:
        return None if str(error).strip() and len(str(error)) < 20_000 else f"not a sentence: {error!r}"
    except Exception as error:
        return repr(error)
    return None


def test_fuzz_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    load_config(str(path))
    for seed in seeds(150):
        write_new(path, damaged(RECIPE.encode(), seed))
        assert failure(lambda: load_config(str(path))) is None, f"seed {seed}"


def test_fuzz_searches() -> None:
    parse_search(SEARCH)
    for seed in seeds(150):
        text = damaged(SEARCH.encode(), seed).decode(errors="replace")
        assert failure(lambda text=text: parse_search(text)) is None, f"seed {seed}"  # type: ignore[misc]


def test_fuzz_overrides() -> None:
    for seed in seeds(200):
        rng = np.random.default_rng(seed)
        texts = []
        for _ in range(rng.integers(1, 3)):
            value = str(rng.choice(_VALUES))
            value = damaged(value.encode(errors="replace"), seed).decode(errors="replace") if seed % 3 == 0 else value
            texts.append(f"{rng.choice(_KEYS)}={value}")
        problem = failure(lambda texts=texts: load_config("digits", parse_overrides(texts)))  # type: ignore[misc]
        assert problem is None, f"seed {seed}: {texts!r}: {problem}"


def test_fuzz_written_text_is_read_back() -> None:
    for seed in seeds(200):
        rng = np.random.default_rng(seed)
        text = "".join(rng.choice(list("01-+.:#&*!|>'\"%@`{}[],?~ntyeox_= \n\u732b"), int(rng.integers(1, 12))))
        assert parse_yaml(dump_yaml({"key": text})) == {"key": text}, f"seed {seed}"


def test_the_fuzzer_sees_a_traceback() -> None:
    """The negative control, and that intact text is read."""
    assert "KeyError" in str(failure(lambda: {}["a"]))
    with pytest.raises(UserError):
        recipe_header("none")
