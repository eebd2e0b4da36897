"""Random text as recipes, searches and overrides: a configuration or a sentence, never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.strict_yaml import dump_yaml, parse_yaml
from spikefleet.errors import UserError
from spikefleet.search.search_files import parse_search
from support.damage import damaged, draws, error_of, write_new
from support.damage import try_all as fuzz

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


def try_all(text: str, read: Callable[[bytes], object], count: int) -> None:
    assert fuzz(text.encode(), read, count, damaged, (UserError,), one_line=False)


def test_fuzz_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"

    def read(content: bytes) -> None:
        write_new(path, content)
        load_config(str(path))

    try_all(RECIPE, read, 100)


def test_fuzz_searches() -> None:
    try_all(SEARCH, lambda content: parse_search(content.decode(errors="replace")), 100)


def test_fuzz_overrides() -> None:
    refused = 0
    for draw in draws(200):
        texts = []
        for _ in range(draw.randint(1, 2)):
            value = draw.choice(_VALUES)
            if draw.random() < 0.3:
                value = damaged(value.encode(errors="replace"), draw).decode(errors="replace")
            texts.append(f"{draw.choice(_KEYS)}={value}")
        error = error_of(lambda _, texts=texts: load_config("digits", parse_overrides(texts)), b"")  # type: ignore[misc]
        assert error is None or isinstance(error, UserError), f"{texts!r}: {error!r}"
        assert error is None or 0 < len(str(error).strip()) < 12_000, texts
        refused += error is not None
    assert refused


def test_fuzz_written_text_is_read_back() -> None:
    letters = "01-+.:#&*!|>'\"%@`{}[],?~ntyeox_= \n\u732b"
    for draw in draws(200):
        text = "".join(draw.choices(letters, k=draw.randint(1, 11)))
        assert parse_yaml(dump_yaml({"key": text})) == {"key": text}
