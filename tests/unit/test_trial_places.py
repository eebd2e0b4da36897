"""How many trials a cluster holds at a time, and what is refused because it never fits."""

from __future__ import annotations

from typing import Any

import pytest

from spikefleet_tune.capacity import check_population, refuse_what_never_fits, trial_request, trials_at_once
from spikefleet_tune.errors import SearchError
from spikefleet_tune.search_file import ResourcesConfig, search_of


def _population(**changes: Any) -> dict[str, Any]:
    return {
        "recipe": "digits",
        "space": {"a": {"choice": [1, 2]}, "b": {"uniform": [0, 1]}},
        "objectives": {"gain": "max"},
        "scheduler": "pbt",
        "budget": {"trials": 3},
        **changes,
    }


@pytest.mark.parametrize(
    ("resources", "nodes", "fitting"),
    [
        ({}, [{"CPU": 2}], 2),
        ({"workers": 2}, [{"CPU": 2}], 1),
        ({"workers": 2}, [{"CPU": 1}, {"CPU": 1}, {"CPU": 1}], 1),
        ({"workers": 2, "cpus_per_worker": 2}, [{"CPU": 3}, {"CPU": 3}], 1),
        ({"cpus_per_worker": 2}, [{"CPU": 1}, {"CPU": 1}], 0),
        ({"gpus_per_worker": 0.25}, [{"CPU": 8, "GPU": 1}, {"CPU": 8}], 4),
        ({"cpus_per_worker": 0.1}, [{"CPU": 1}], 10),
        ({"max_concurrent": 1}, [{"CPU": 8}], 1),
        ({}, [], 0),
    ],
)
def test_as_many_trials_as_have_places(resources: dict[str, Any], nodes: list[dict[str, float]], fitting: int) -> None:
    config = ResourcesConfig.model_validate(resources)
    assert trials_at_once(config, nodes) == fitting
    if not fitting:
        with pytest.raises(SearchError, match=r"lower resources\.workers"):
            refuse_what_never_fits(config, nodes)


def test_a_population_of_groups_must_fit_as_a_whole() -> None:
    search = search_of(_population(resources={"workers": 2}))
    with pytest.raises(SearchError, match=r"the cluster fits 2 trials; set budget\.trials=2 or lower"):
        check_population(search, 3, [{"CPU": 4}])
    check_population(search, 3, [{"CPU": 6}])
    check_population(search_of(_population()), 3, [{"CPU": 1}])  # Ray Tune takes turns with one worker each


def test_a_trial_with_its_own_workers_holds_no_cpu() -> None:
    assert "CPU" not in trial_request(ResourcesConfig(workers=2))
    assert trial_request(ResourcesConfig(cpus_per_worker=2, gpus_per_worker=0.5)) == {"CPU": 2, "GPU": 0.5}
