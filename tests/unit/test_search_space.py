"""Search files, the check of their spaces, and the points that samplers propose."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from spikefleet_tune.errors import SearchError
from spikefleet_tune.samplers import PointSampler
from spikefleet_tune.schedulers import mutate
from spikefleet_tune.search_check import check_search
from spikefleet_tune.search_file import search_of
from spikefleet_tune.space import Dimension, Space, signature

_SEARCH: dict[str, Any] = {
    "recipe": "digits",
    "overrides": {"train.epochs": 2},
    "space": {
        "model.neuron.bound": {"choice": [1, 2, 4], "when": {"model.neuron.kind": ["ilif"]}},
        "model.neuron.kind": {"choice": ["if", "ilif"]},
        "model.timesteps": {"choice": [1, 2, 4]},
        "optim.lr": {"log_uniform": [1e-3, 0.3]},
    },
    "objectives": {"val/top1": "max", "energy_mj": "min"},
    "constraints": ["timesteps * bound <= 8", "optim.lr < 0.2 or timesteps == 1"],
    "sampler": {"kind": "tpe", "startup": 4, "population": 4},
    "budget": {"trials": 10},
    "seed": 3,
}


def _tree(**changes: Any) -> dict[str, Any]:
    return {
        "recipe": "digits",
        "space": {"a": {"choice": [1, 2]}, "b": {"uniform": [0, 1]}},
        "objectives": {"gain": "max"},
        "budget": {"trials": 3},
        **changes,
    }


def test_a_search_is_read_and_written_back() -> None:
    search = search_of(_SEARCH)
    assert search_of(search.dump()) == search
    space = search.space_view()
    assert list(space.dimensions) == ["model.neuron.kind", "model.neuron.bound", "model.timesteps", "optim.lr"]
    assert search.directions == ("max", "min")
    assert search.space["optim.lr"].log_uniform == (0.001, 0.3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spce": {}}, r"unknown key 'spce'; did you mean 'space'\?"),
        ({"budget": {"trails": 3}}, r"unknown key 'budget.trails'; did you mean 'trials'\?"),
        ({"space": {"a": {"choise": [1]}}}, r"unknown key 'space.a.choise'; did you mean 'choice'\?"),
        ({"space": {"a": {"choice": []}}}, r"space.a: choice=\[\] must have at least one value"),
        ({"space": {"a": {"choice": [1, 1]}}}, r"space.a: choice repeats 1"),
        ({"space": {"a": {"uniform": [2, 1]}}}, r"space.a: uniform=\[2, 1\] must have its lowest value first"),
        ({"space": {"a": {"int": [1, 1]}}}, r"space.a: int=\[1, 1\] must have its lowest value first"),
        ({"space": {"a": {"log_uniform": [0, 1]}}}, r"log_uniform=\[0, 1\] must start above 0"),
        ({"space": {"a": {"uniform": [0, float("inf")]}}}, r"space.a.uniform.1=inf"),
        ({"space": {"a": {}}}, "set exactly one of choice, uniform, log_uniform and int"),
        ({"space": {"a": {"choice": [1], "int": [0, 1]}}}, "set exactly one of"),
        ({"space": {}}, "space is empty"),
        ({"space": {"a": {"choice": [1], "when": {"aa": [1]}}}}, r"space.a.when: 'aa' is not in the space"),
        (
            {"space": {"a": {"choice": [1, 2]}, "b": {"choice": [1], "when": {"a": [3]}}}},
            r"space.b.when: a=3 is outside the space",
        ),
        (
            {"space": {"a": {"choice": [1], "when": {"b": [1]}}, "b": {"choice": [1], "when": {"a": [1]}}}},
            "form a cycle",
        ),
        ({"overrides": {"a": 1}}, "a is in both space and overrides"),
        ({"objectives": {}}, "objectives={}|objectives: "),
        ({"objectives": {"gain": "up"}}, r"objectives.gain='up': must be 'max' or 'min'"),
        ({"budget": {"trials": 0}}, r"budget.trials=0: must be greater than or equal to 1"),
        ({"budget": {"hours": 0}}, r"budget.hours=0: must be greater than 0"),
        ({"budget": {}}, "budget is empty; set budget.trials, budget.hours or both"),
        ({"sampler": "bayes"}, r"sampler.kind='bayes': must be 'random', 'grid'"),
        ({"sampler": "grid"}, "space.b is continuous; sampler grid needs"),
        (
            {"sampler": "grid", "space": {str(i): {"int": [0, 99]} for i in range(3)}},
            "the grid has more than 20000 points",
        ),
        ({"sampler": "listed"}, "sampler.kind=listed needs points|remove space"),
        (
            {"objectives": {"gain": "max", "cost": "min"}, "scheduler": "asha"},
            r"but there are 2 objectives; set scheduler.metric, for example scheduler.metric=gain",
        ),
        (
            {"scheduler": {"kind": "asha", "metric": "loss"}},
            "scheduler.metric=loss is not an objective; set scheduler.mode",
        ),
        ({"scheduler": {"kind": "asha", "mode": "min"}}, "scheduler.mode=min contradicts the objective gain"),
        ({"scheduler": {"kind": "pbt", "mutate": ["aa"]}}, "scheduler.mutate: 'aa' is not in the space"),
        ({"constraints": ["c <= 1"]}, "'c' is neither a key of space nor of overrides"),
        ({"constraints": ["a > 5"]}, "no point satisfies the constraints 'a > 5'"),
        ({"points": [{"a": 7}]}, r"points\[0\]: a=7 is outside the space \(choice: \[1, 2\]\)"),
        ({"resources": {"workers": 0}}, "resources.workers=0"),
        (
            {"space": {}, "sampler": "listed", "points": [{"c": 1}], "overrides": {"c": 2}},
            r"c is in both points\[0\] and overrides",
        ),
        ({"scheduler": "pbt", "resources": {"max_concurrent": 1}}, "max_concurrent=1 has no effect with scheduler pbt"),
    ],
)
def test_bad_searches_are_refused_in_a_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SearchError, match=said):
        search_of(_tree(**changes))


# ---------------------------------------------------------------------------------------------- check of points


def test_each_value_is_checked_before_anything_starts() -> None:
    search = search_of(_SEARCH)
    seen: list[Mapping[str, Any]] = []

    def check(overrides: Mapping[str, Any]) -> str | None:
        seen.append(overrides)
        return (
            "a binary neuron has no bound" if overrides["model.neuron.kind"] == "if" and "bound" in overrides else None
        )

    check_search(search, check, reportable=["val/top1", "energy_mj"])
    assert all(point["train.epochs"] == 2 for point in seen)
    for key, dimension in search.space.items():
        assert {point.get(key) for point in seen} >= set(dimension.corners)

    with pytest.raises(SearchError, match=r"space.model.timesteps: 4 is not valid: too long"):
        check_search(search, lambda point: "too long" if point["model.timesteps"] == 4 else None)
    with pytest.raises(SearchError, match=r"space.optim.lr: 0.3 is not valid: too fast"):
        check_search(search, lambda point: "too fast" if point["optim.lr"] == 0.3 else None)
    with pytest.raises(SearchError, match=r"this task reports no 'val/top1'; did you mean 'val/top5'\?"):
        check_search(search, lambda point: None, reportable=["val/top5", "energy_mj"])


def test_a_scheduler_decides_by_what_each_epoch_reports() -> None:
    def check(metric: str) -> None:
        search = search_of(
            _tree(scheduler={"kind": "asha", "metric": metric, "mode": "min"}, objectives={"cost": "min"})
        )
        check_search(search, lambda overrides: None, {"cost", "gain"}, {"gain"})

    check("gain")
    with pytest.raises(SearchError, match="scheduler asha cannot use 'cost': trials do not report it after each epoch"):
        check("cost")


def test_of_a_list_the_points_are_checked_and_not_what_lies_under_them() -> None:
    seen: list[dict[str, Any]] = []

    def refuse(overrides: Mapping[str, Any]) -> str | None:
        seen.append(dict(overrides))
        return "too large" if overrides["x"] > 1 else None

    tree = {"recipe": "r", "sampler": "listed", "objectives": {"gain": "max"}}
    check_search(search_of({**tree, "points": [{"x": 1}]}), refuse)
    assert seen == [{"x": 1}]
    with pytest.raises(SearchError, match="x=2 is not valid: too large"):
        check_search(search_of({**tree, "points": [{"x": 1}, {"x": 2}]}), refuse)


def test_an_impossible_combination_is_refused_by_name() -> None:
    """Each value is fine in some point; D on a binary neuron is not, unless D is a branch."""
    space = {"kind": {"choice": ["if", "ilif"]}, "D": {"choice": [1, 2]}}

    def check(overrides: Mapping[str, Any]) -> str | None:
        return "kind=if is binary" if overrides["kind"] == "if" and overrides.get("D", 1) > 1 else None

    with pytest.raises(SearchError, match=r"the combination kind='if', D=2 is not valid: kind=if is binary; exclude"):
        check_search(search_of(_tree(space=space)), check)
    never_binary = {**space, "D": {"choice": [2, 4]}}
    with pytest.raises(SearchError, match=r"space\.kind: 'if' is not valid: kind=if is binary"):
        check_search(search_of(_tree(space=never_binary)), check)
    branch = {**space, "D": {"choice": [1, 2], "when": {"kind": ["ilif"]}}}
    check_search(search_of(_tree(space=branch)), check)
    never = search_of(_tree(space={"a": {"choice": [1, 9]}, "b": {"choice": [1, 2]}}, constraints=["a * b < 9"]))
    with pytest.raises(SearchError, match="no point with 9 satisfies"):
        check_search(never, lambda point: None)


# --------------------------------------------------------------------------------------------------- samplers


def _figures(point: Mapping[str, Any]) -> list[float]:
    return [
        point["optim.lr"] * point["model.timesteps"],
        float(point["model.timesteps"] * point.get("model.neuron.bound", 1)),
    ]


@pytest.mark.parametrize(("kind", "trials"), [("random", 24), ("tpe", 24), ("nsga2", 24), ("gp", 8)])
def test_samplers_propose_what_is_allowed_and_go_on_where_they_were(kind: str, trials: int) -> None:
    search = search_of({**_SEARCH, "sampler": {"kind": kind, "startup": 4, "population": 4}})
    space, sampler = search.space_view(), PointSampler(search)
    proposals = []
    for number in range(trials):
        proposal = sampler.ask(number)
        assert proposal is not None
        space.check(proposal.point, "proposal")
        assert ("model.neuron.bound" in proposal.point) == (proposal.point["model.neuron.kind"] == "ilif")
        proposals.append(proposal)
        sampler.tell(number, None if number % 7 == 3 else _figures(proposal.point))
    assert len({signature(proposal.point) for proposal in proposals}) == trials

    restored = PointSampler(search)
    half = trials * 5 // 8
    for proposal in proposals[:half]:
        restored.replay(proposal.number, proposal.point, proposal.memory)
        restored.tell(proposal.number, None if proposal.number % 7 == 3 else _figures(proposal.point))
    for expected in proposals[half:]:
        found = restored.ask(expected.number)
        assert found == expected
        assert found is not None
        restored.tell(found.number, None if found.number % 7 == 3 else _figures(found.point))

    other = PointSampler(search_of({**search.dump(), "seed": 4}))
    assert other.ask(0) != proposals[0]


def test_a_model_learns_where_it_is_good() -> None:
    """The negative control is chance: it finds the best corner of a large space much later."""

    def best_of(kind: str) -> float:
        space = {"a": {"uniform": [0, 1]}, "b": {"uniform": [0, 1]}}
        sampler = PointSampler(search_of(_tree(space=space, sampler=kind)))
        best = 0.0
        for number in range(40):
            proposal = sampler.ask(number)
            assert proposal is not None
            gain = 2 - abs(proposal.point["a"] - 0.9) - abs(proposal.point["b"] - 0.1)
            best = max(best, gain)
            sampler.tell(number, [gain])
        return best

    assert best_of("tpe") > best_of("random")


def test_a_grid_is_tried_once_and_ends() -> None:
    space = {
        "kind": {"choice": ["if", "ilif"]},
        "D": {"int": [1, 4], "when": {"kind": ["ilif"]}},
        "T": {"choice": [1, 4]},
    }
    search = search_of(_tree(space=space, sampler="grid", budget={}, constraints=["T * D <= 8"]))
    sampler = PointSampler(search)
    found: list[dict[str, Any]] = []
    while (proposal := sampler.ask(len(found))) is not None:
        found.append(proposal.point)
        sampler.tell(proposal.number, [1.0])
    assert len(found) == len({signature(point) for point in found}) == 2 + 6
    assert all(point["T"] * point.get("D", 1) <= 8 for point in found)
    assert sampler.exhausted
    other = PointSampler(search_of({**search.dump(), "seed": 1})).ask(0)
    assert other is not None
    assert found[0] != other.point


def test_a_small_space_is_exhausted_by_any_sampler() -> None:
    search = search_of(_tree(space={"a": {"choice": [1, 2, 3]}, "b": {"choice": [True, None, [1]]}}, sampler="tpe"))
    sampler = PointSampler(search)
    points: list[dict[str, Any]] = []
    while (proposal := sampler.ask(len(points))) is not None:
        points.append(proposal.point)
        sampler.tell(proposal.number, [float(proposal.point["a"])])
    assert len(points) == 9
    assert {signature({"b": point["b"]}) for point in points} == {'{"b": true}', '{"b": null}', '{"b": [1]}'}


def test_points_come_first_and_listed_ones_alone() -> None:
    search = search_of(_tree(points=[{"a": 2}, {"a": 1, "b": 0.5}]))
    sampler = PointSampler(search, queued=[{"b": 0.25}])
    first, second, third = (sampler.ask(number) for number in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.point["a"], second.point, third.point["b"]) == (2, {"a": 1, "b": 0.5}, 0.25)
    listed = search_of(_tree(space={}, sampler="listed", points=[{"train.seed": 0}, {"train.seed": 1}], budget={}))
    sampler = PointSampler(listed)
    assert [one.point if (one := sampler.ask(n)) else None for n in range(3)] == [
        {"train.seed": 0},
        {"train.seed": 1},
        None,
    ]


def test_mutation_leaves_firm_keys_and_constraints_alone() -> None:
    space = Space(
        {"T": Dimension(choice=(1, 2, 4)), "lr": Dimension(uniform=(0.1, 1.0)), "width": Dimension(choice=(8, 16))},
        {},
        ("T * width <= 32",),
    )
    rng = random.Random(0)
    point: dict[str, Any] = {"T": 2, "lr": 0.5, "width": 16}
    seen = set()
    for _ in range(50):
        point = mutate(space, point, ["T", "lr"], 0.3, rng)
        space.check(point, "mutant")
        assert point["width"] == 16
        seen.add(point["T"])
    assert seen == {1, 2}
