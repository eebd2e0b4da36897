"""YAML by the core schema, overrides verbatim: what was typed is what is used, or a sentence."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from spikefleet.config.recipes import list_recipes, load_config, parse_config, parse_overrides
from spikefleet.config.strict_yaml import dump_yaml, parse_value, parse_yaml
from spikefleet.errors import UserError
from spikefleet.search.search_files import parse_search

SCALARS: list[tuple[str, Any]] = [
    ("010", 10),
    ("-007", -7),
    ("1e-3", 0.001),
    ("1.5E2", 150.0),
    (".5", 0.5),
    ("5.", 5.0),
    ("0", 0),
    ("true", True),
    ("False", False),
    ("null", None),
    ("~", None),
    ("yes", "yes"),
    ("off", "off"),
    ("1:30", "1:30"),
    ("1_000", "1_000"),
    ("2026-11-01", "2026-11-01"),
    ("2026-11-01 10:00:00", "2026-11-01 10:00:00"),
    ("0b11", "0b11"),
    ("+.inf", math.inf),
    ("1e", "1e"),
    ("<<", "<<"),
    ("=", "="),
    ("nULL", "nULL"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_the_core_schema_in_files_and_overrides(text: str, value: Any) -> None:
    for found in (parse_yaml(f"key: {text}\n")["key"], parse_value(text)):
        assert found == value
        assert type(found) is type(value)


def test_what_pyyaml_makes_of_them_is_something_else() -> None:
    """The negative control: the same texts by YAML 1.1."""
    loaded = [yaml.safe_load(f"key: {text}\n")["key"] for text in ("010", "yes", "1:30", "2026-11-01", "1e-3")]
    assert loaded[:3] == [8, True, 90]
    assert not isinstance(loaded[3], str)
    assert loaded[4] == "1e-3"


@pytest.mark.parametrize("text", ["0o10", "0x1F", "-0x1f"])
def test_other_bases_are_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="octal or hexadecimal; write it in decimal"):
        parse_value(text)
    with pytest.raises(yaml.YAMLError, match=r"octal or hexadecimal(.|\n)*line 1"):
        parse_yaml(f"key: {text}")
    assert parse_yaml(f"key: '{text}'") == {"key": text}


@pytest.mark.parametrize(
    "text",
    [
        "/x/my set #2",
        "#2",
        "a: b",
        "- a",
        "'single'",
        "c:\\new",
        "{",
        "%p",
        "* all",
        "&x",
        " two  spaces ",
        "!tag",
        "a, b",
    ],
)
def test_text_of_an_override_is_verbatim(text: str) -> None:
    if text.startswith("{"):
        with pytest.raises(yaml.YAMLError, match="not valid JSON"):
            parse_value(text)
        return
    assert parse_value(text) == text
    config = load_config("digits", parse_overrides([f"data.root={text}"]))
    assert str(config.data.root) == text
    assert parse_config(parse_yaml(dump_yaml(config.dump())), "dumped") == config


def test_a_hash_after_a_space_is_a_comment_in_a_file_alone() -> None:
    assert parse_yaml("key: /x/my set #2\n") == {"key": "/x/my set"}
    assert parse_yaml("key: /x/my#2\n") == {"key": "/x/my#2"}


@pytest.mark.parametrize(
    ("text", "value"), [("[1, 2.5, true]", [1, 2.5, True]), ('{"a": [null]}', {"a": [None]}), ('"010"', "010")]
)
def test_lists_sections_and_quoted_texts_are_json(text: str, value: Any) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2", "not valid JSON"),
        ("{a: 1}", "not valid JSON"),
        ('{"a": 1, "a": 2}', "key 'a' is repeated"),
        ("[NaN]", "NaN is not a number"),
        ("[" * 100 + "]" * 100, "more than 50"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "a number of 5000 digits"),
    ],
)
def test_what_is_no_value_is_a_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_overrides([f"optim.milestones={text}"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.timesteps=true", "model.timesteps=True: expected a number, found true or false"),
        ("model.timesteps=yes", "model.timesteps='yes'"),
        ('train.epochs="3"', "train.epochs='3': expected a number, found text"),
        ("train.epochs=1_000", "train.epochs='1_000': expected a number, found text"),
        ("optim.nesterov=1", "optim.nesterov=1: expected true or false, found a number"),
        ("optim.nesterov=yes", "optim.nesterov='yes': expected true or false, found text"),
        ("optim.lr=false", "optim.lr"),
        ("data.transform.cutout=true", "data.transform.cutout=True: expected a number"),
        ("model.stages=[1,true]", "model.stages.1=True: expected a number"),
    ],
)
def test_a_value_of_another_kind_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config("digits", parse_overrides([override]))


def test_a_seed_with_a_leading_zero_is_decimal(tmp_path: Path) -> None:
    assert load_config("digits", parse_overrides(["train.seed=010"])).train.seed == 10
    (tmp_path / "mine.yaml").write_text("base: digits\ntrain: {seed: 010}\noptim: {lr: 1e-3}\n")
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.train.seed, config.optim.lr) == (10, 0.001)


def test_searches_keep_the_kinds_of_values() -> None:
    text = (
        "recipe: digits\nobjectives: {val/top1: max}\nspace: {optim.lr: {uniform: [0.1, 1e-3]}}\nbudget: {trials: %s}\n"
    )
    assert parse_search(text.replace("[0.1, 1e-3]", "[1e-3, 0.1]") % 3).budget.trials == 3
    with pytest.raises(UserError, match=r"budget\.trials=True: expected a number"):
        parse_search(text.replace("[0.1, 1e-3]", "[1e-3, 0.1]") % "true")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("? [a, b]\n: 1\n", r"key .* must be text.*line 1"),
        ("base: digits\nmodel: " + "[" * 3000 + "]" * 3000 + "\n", "more than 50 sections inside one another.*line 2"),
        ("base: digits\n1: 2\n", r"key '1' must be text.*line 2"),
        ("base: digits\ntrain:\n  seed: \x01 1\n", "special characters are not allowed"),
        ("base: digits\nbase: digits\n", "key 'base' is repeated.*line 2"),
        ("a: &x 1\nb: *x\n", "aliases .* are not allowed"),
        ("a: !!python/name:os.system x\n", "could not determine a constructor"),
        ("a: !!bool yes\n", "'yes' is not of type bool"),
        ("a: !!timestamp 2026-01-01\n", "could not determine a constructor"),
    ],
)
def test_odd_files_are_refused_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"mine\.yaml is not valid YAML: .*{said}"):
        load_config(str(path))


def test_every_recipe_is_read_back_as_it_was_written() -> None:
    for name in list_recipes():
        config = load_config(name)
        assert parse_config(parse_yaml(dump_yaml(config.dump())), name) == config
        assert parse_config(yaml.safe_load(dump_yaml(config.dump())), name) == config


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: digits\n", encoding="utf-8-sig")
    assert load_config(str(path)).recipe == "mine"
