"""Recorded searches: the front on the page of evidence, by one seed, and with other seeds of its members or of all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spikefleet.errors import UserError
from spikefleet.reproduction.evidence_page import Evidence, as_page, plots_of, write_evidence
from spikefleet.reproduction.front_plot import draw_front
from spikefleet.reproduction.recorded_search import (
    RecordedSearch,
    RecordedTrial,
    _with_others,
    recorded_searches,
)
from spikefleet.search.run_search import confirmed_choice
from spikefleet_tune.importance import importance
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.result import SearchResult
from spikefleet_tune.search_file import search_of

ACCURACY = {1: 0.80, 2: 0.90, 4: 0.89}  # T=4 costs more and gives less: not on the front


def metrics(accuracy: float, energy_mj: float) -> dict[str, float]:
    return {"val/top1": accuracy, "test/top1": accuracy - 0.01, "energy_mj": energy_mj}


def search() -> RecordedSearch:
    """Three points by T with one training each."""
    trials = tuple(
        RecordedTrial(f"small-{i:04}", {"model.timesteps": steps}, metrics(accuracy, 1e-3 * steps), ())
        for i, (steps, accuracy) in enumerate(ACCURACY.items())
    )
    return RecordedSearch(
        name="small",
        words=("small", "train.epochs=2"),
        recipe="digits",
        keys=("model.timesteps",),
        objectives={"val/top1": "max", "energy_mj": "min"},
        trials=trials,
        without_values=1,
        importance={"val/top1": {"model.timesteps": 1.0}, "energy_mj": "all trials have the same value"},
        intervals={"val/top1": {"model.timesteps": (0.9, 1.0)}, "energy_mj": {}},
        method="fANOVA",
        knee="small-0001",
        registered={"trial": "small-0001", "name": "sg_resnet_digits", "version": 3, "alias": "champion"},
        dataset="digits",
        data_hash="d" * 64,
        code_versions=("abc",),
        seconds=90.0,
    )


def with_others(one: RecordedSearch, others: dict[str, tuple[float, ...]]) -> RecordedSearch:
    """The search with further trainings: their accuracies by trial."""
    trials = tuple(
        replace(trial, others=tuple(metrics(value, trial.metrics["energy_mj"]) for value in others.get(trial.name, ())))
        for trial in one.trials
    )
    return replace(one, trials=trials)


def page(one: RecordedSearch) -> str:
    return as_page(Evidence([], searches=[one]), "plots", "COMMAND")


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    one = with_others(search(), {"small-0000": (0.81, 0.82)})
    path = one.write(tmp_path / "results")
    assert path.name == "search-small.json"
    assert list(recorded_searches(tmp_path / "results")) == [one]
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in plain.items() if key != "recipe"}))
    with pytest.raises(UserError, match=r"search-small\.json is damaged: .*recipe.*record the search again"):
        list(recorded_searches(tmp_path / "results"))


def test_the_front_with_one_seed_is_that_of_the_search() -> None:
    said = page(search())
    assert "3 trainings, 1 min 30 s in all." in said
    assert "The front is by one training of each point; 2 of 3 trials are on it." in said
    assert "Left out: 1 trial without the objectives." in said
    assert "| 0000 | 1 | 80 | 1 | 79 | front |" in said
    row = "| 0001 | 2 | 90 | 2 | 89 | front, knee in the search, registered as sg_resnet_digits version 3 |"
    assert row in said
    assert "| 0002 | 4 | 89 | 4 | 88 |  |" in said
    assert "| val/top1, % | 100% (90% to 100%) |" in said
    assert "What decides energy, uJ: not computed, all trials have the same value." in said
    assert "`spikefleet tune small train.epochs=2 --trials 4 --register knee --results platform" in said


def test_other_seeds_of_the_front_stand_beside_the_choice() -> None:
    said = page(with_others(search(), {"small-0000": (0.70, 0.72), "small-0001": (0.95, 0.97)}))
    assert "3 trials with 1 to 3 seeds each" in said
    assert "is partly luck" in said
    assert "| 0000 | 1 | 80 (71 +- 1.4) | 1 (1 +- 0) | 79 (70 +- 1.4) | front, knee by the other seeds |" in said
    assert "--confirm 2 --register small-0001" in said, "the knee by the other seeds would be another one"
    assert "--confirm-all" not in said


def test_with_all_trials_confirmed_the_front_is_by_means() -> None:
    """The third point, dominated in the search, is the most accurate one over three seeds."""
    others = {"small-0000": (0.80, 0.80), "small-0001": (0.84, 0.84), "small-0002": (0.95, 0.95)}
    one = with_others(search(), others)
    assert [trial.name for trial in one.front] == ["small-0001", "small-0000"]
    assert [trial.name for trial in one.front_of_means] == ["small-0002", "small-0001", "small-0000"]
    said = page(one)
    assert "The front is by means over all seeds; 3 of 3 trials are on it." in said
    assert "| 0002 | 4 | 93 +- 3.5 | 4 +- 0 | 92 +- 3.5 | " in said
    assert "--confirm 2 --confirm-all --register small-0001" in said


def test_the_front_is_drawn_and_linked(tmp_path: Path) -> None:
    evidence = Evidence([], searches=[with_others(search(), {"small-0000": (0.70, 0.72)})])
    (path,) = write_evidence(evidence, tmp_path / "page.md", tmp_path / "plots", "COMMAND")
    assert plots_of(evidence, tmp_path / "plots") == [path]
    assert path.stat().st_size > 5_000
    for objectives in ({"val/top1": "max"}, {"val/top1": "max", "energy_mj": "min", "latency_ms": "min"}):
        trials = tuple(
            replace(trial, metrics={**trial.metrics, "latency_ms": 1.0 + number})
            for number, trial in enumerate(search().trials)
        )
        other = replace(search(), objectives=objectives, trials=trials, keys=())
        assert draw_front(other, tmp_path / "other.png")
        assert "## The front of `small train.epochs=2`" in page(other)
    assert "](plots/front_small.png)" in (tmp_path / "page.md").read_text()


def test_what_is_registered_is_chosen_by_the_other_seeds() -> None:
    """The knee and the best one of a search by one seed are partly luck."""
    accuracies = {"T": (0.60, 0.90, 0.91, 0.92), "others": (0.60, 0.65, 0.90, 0.91)}
    tree = {
        "recipe": "digits",
        "space": {"model.timesteps": {"choice": [1, 2, 4, 8]}},
        "objectives": {"val/top1": "max", "energy_mj": "min"},
        "sampler": "grid",
    }
    records = []
    for i, accuracy in enumerate(accuracies["T"]):
        point = {"model.timesteps": 2**i}
        values = {"val/top1": accuracy, "energy_mj": 1e-3 * (i + 1)}
        records.append(TrialRecord(i, f"small-{i:04}", point, point, values, "finished", 1.0, 0, ""))
    result = SearchResult("small", Path("unused"), search_of(tree), tuple(records), 3.0, True)
    confirmation: list[dict[str, Any]] = [
        {"trial": f"small-{i:04}", "seeds": 2, "val/top1": {"mean": accuracy}, "energy_mj": {"mean": 1e-3 * (i + 1)}}
        for i, accuracy in enumerate(accuracies["others"])
    ]
    assert result.knee is not None
    assert result.knee.name == "small-0001"
    assert confirmed_choice(result, confirmation, "knee") == "small-0002"
    assert confirmed_choice(result, confirmation[:2], "best") == "small-0001"
    assert confirmed_choice(result, confirmation, "best") == "small-0003"
    assert confirmed_choice(result, [*confirmation[:3], confirmation[3] | {"seeds": 1}], "best") == "small-0002"
    assert confirmed_choice(result, confirmation, "small-0001") == "small-0001"
    assert confirmed_choice(result, [], "knee") == "knee"
    assert confirmed_choice(result, [row | {"seeds": 0} for row in confirmation], "best") == "best"


def test_importance_is_over_all_trainings_where_each_point_has_further_seeds() -> None:
    tree = {
        "recipe": "digits",
        "space": {"model.timesteps": {"choice": [1, 2, 4]}, "model.neuron.bound": {"choice": [1, 2]}},
        "objectives": {"val/top1": "max"},
        "sampler": "grid",
    }
    records = []
    for i in range(6):
        point = {"model.timesteps": 2 ** (i // 2), "model.neuron.bound": 1 + i % 2}
        metrics = {"val/top1": 0.5 + 0.1 * (i // 2)}
        records.append(TrialRecord(i, f"small-{i:04}", point, point, metrics, "finished", 1.0, 0, ""))
    result = SearchResult("small", Path("unused"), search_of(tree), tuple(records), 6.0, True)

    def trials(seeds: int) -> list[RecordedTrial]:
        return [RecordedTrial(one.name, one.point, one.metrics, (one.metrics,) * seeds) for one in records]

    assert _with_others(result, trials(0)) == result
    assert importance(result) == {"val/top1": "needs 8 trials with values, found 6"}
    all_of = _with_others(result, trials(2))
    assert len(all_of.comparable) == 18
    shares = importance(all_of)["val/top1"]
    assert isinstance(shares, dict)
    assert shares["model.timesteps"] > 0.9
