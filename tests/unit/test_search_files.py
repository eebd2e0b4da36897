"""Search files: found by name or path, read strictly, and refused in a sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from spikefleet.cli.tuning import wanted_search
from spikefleet.config.recipes import load_config
from spikefleet.errors import UserError
from spikefleet.reproduction.table import load_table
from spikefleet.search import search_files
from spikefleet.search.search_files import load_search, objectives_of, parse_search
from spikefleet_tune.errors import SearchError
from spikefleet_tune.samplers import PointSampler
from spikefleet_tune.search_file import list_searches, search_of, search_text

TABLE_4 = load_table("spike_yolo_table4").groups[0].rows

_TEXT = """
recipe: digits
space:
  model.timesteps: {choice: [1, 2, 4]}
  optim.lr: {log_uniform: [1e-3, 0.3]}
objectives: {val/top1: max, energy_mj: min}
budget: {trials: 10}
"""


def test_a_search_is_read() -> None:
    search = parse_search(_TEXT)
    assert search == search_of(
        {
            "recipe": "digits",
            "space": {"model.timesteps": {"choice": [1, 2, 4]}, "optim.lr": {"log_uniform": [0.001, 0.3]}},
            "objectives": {"val/top1": "max", "energy_mj": "min"},
            "budget": {"trials": 10},
        }
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping"),
        ("- a", "must be a mapping"),
        ("recipe: [", "not valid YAML"),
        ("recipe: a\nrecipe: b", "key 'recipe' is repeated"),
        ("a: &x 1\nb: *x", "aliases"),
        ("recipe: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("recipe: 2001-99-99", "'objectives' is missing"),
        ("[" * 5000, "not valid YAML"),
        ("recipe: digits", r"'objectives' is missing"),
        (_TEXT.replace("trials", "trails"), r"mine: unknown key 'budget.trails'; did you mean 'trials'\?"),
    ],
)
def test_bad_yaml_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_search(text, "mine")


def test_searches_are_found_by_name_or_path(tmp_path: Path) -> None:
    near = r"search 'digits_t_gate' does not exist; did you mean 'digits_t_gate_schedule'\?"
    with pytest.raises(UserError, match=near):
        load_search("digits_t_gate")
    with pytest.raises(UserError) as caught:
        load_search("none")
    assert "scenes_t_d" in str(caught.value)
    to_come = set(list_searches()) - set(search_files.list_searches())
    assert not to_come & set(re.findall(r"\w+", str(caught.value)))
    with pytest.raises(SearchError, match=near):
        search_text("digits_t_gate")
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        load_search(str(tmp_path / "none.yaml"))
    path = tmp_path / "mine.yaml"
    path.write_text(_TEXT)
    assert load_search(str(path)) == parse_search(_TEXT)
    path.write_bytes(_TEXT.encode() + b"# \xff\n")
    with pytest.raises(UserError, match=r"mine\.yaml is not UTF-8 text"):
        load_search(str(path))
    path.write_text(_TEXT + "#" * (1 << 20))
    with pytest.raises(UserError, match=r"mine\.yaml has \d+ bytes; at most 1 MiB is allowed"):
        load_search(str(path))


@pytest.mark.parametrize("name", list_searches())
def test_built_in_searches_are_sound(name: str) -> None:
    search = load_search(name)
    assert set(search.objectives.values()) == {"max", "min"}
    assert "energy_mj" in search.objectives
    sampler = PointSampler(search)
    for number in range(3):
        proposal = sampler.ask(number)
        assert proposal is not None
        search.space_view().check(proposal.point, "proposal")


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        (
            "gen1_t_d",
            {(row.overrides["model.timesteps"], row.overrides["model.neuron.bound"]) for row in TABLE_4} | {(1, 4)},
        ),
        ("saccade_scenes_t_d", {(t, d) for t in (1, 2, 4) for d in (1, 2, 4)} - {(4, 4)}),
        ("saccades_t_gate_schedule", None),
    ],
)
def test_every_trial_on_events_has_a_valid_configuration(name: str, grid: set[tuple[int, int]] | None) -> None:
    search = load_search(name)
    sampler = PointSampler(search)
    trials: list[dict[str, Any]] = []
    while len(trials) < 40 and (proposal := sampler.ask(len(trials))) is not None:
        trials.append(load_config(search.recipe, {**search.space_view().fixed, **proposal.point}).model.model_dump())
    if grid is None:
        assert {trial["timesteps"] for trial in trials} <= {1, 4, 8}
        assert len(trials) == 40
    else:
        assert sorted((trial["timesteps"], trial["neuron"]["bound"]) for trial in trials) == sorted(grid)
    with pytest.raises(UserError, match="timesteps"):
        load_config(search.recipe, {**search.space_view().fixed, "model.timesteps": 0})


def test_the_search_package_reads_plain_data_only() -> None:
    for path in (Path(__file__).parents[2] / "tune" / "spikefleet_tune").glob("*.py"):
        assert "import yaml" not in path.read_text(), path


def test_objectives_of_the_command_line() -> None:
    assert objectives_of("top1, energy_mj,latency_ms") == {"val/top1": "max", "energy_mj": "min", "latency_ms": "min"}
    assert objectives_of("val/map50:max,parameters:max") == {"val/map50": "max", "parameters": "max"}


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "must be the name"), ("top1,", "must be the name"), ("top1:up", "must be"), ("top1,val/top1", "twice")],
)
def test_bad_objectives_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=f"--objectives .*{said}"):
        objectives_of(text)


def test_the_command_replaces_the_objectives() -> None:
    wanted = wanted_search("digits_t_gate_schedule", {}, "top1,latency_ms")
    assert dict(wanted.objectives) == {"val/top1": "max", "latency_ms": "min"}
    assert dict(wanted_search("digits_t_gate_schedule", {}).objectives) == {"val/top1": "max", "energy_mj": "min"}
