"""Looking up the best registered version, against a search by brute force."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spikefleet.errors import UserError
from spikefleet.registry.api import RegisteredVersion, best
from support.registered import Trained


@pytest.fixture(scope="module")
def catalogue(first: Trained, tmp_path_factory: pytest.TempPathFactory) -> list[RegisteredVersion]:
    directory = tmp_path_factory.mktemp("weights")
    versions = []
    choices = [(1, "bsg", 0.91, 3.5), (2, "bsg", 0.95, 9.0), (2, "add", 0.95, 8.0), (4, "bsg", 0.97, 20.0)]
    for seed, (timesteps, connection, top1, energy) in enumerate(choices, start=10):
        candidate = first.again(seed, directory, timesteps=timesteps, connection=connection)
        metrics = {"val/top1": top1, "test/top1": 1 - top1, "energy_mj": energy}
        tags = {**first.tags, "dataset": "cat" if seed < 13 else "dog"}
        versions.append(candidate.register(f"catalogue{seed % 2}", metrics=metrics, tags=tags))
    return versions


@given(
    dataset=st.sampled_from(["cat", "dog"]),
    metric=st.sampled_from(["top1", "val/top1", "test/top1", "energy_mj"]),
    mode=st.sampled_from(["max", "min"]),
    timesteps=st.none() | st.tuples(st.sampled_from(["<=", ">", "==", "!="]), st.integers(0, 5)),
    energy=st.none() | st.floats(0, 25),
    connection=st.none() | st.sampled_from(["bsg", "add", "iand"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_best_is_what_brute_force_finds(
    catalogue: list[RegisteredVersion],
    uri: str,
    dataset: str,
    metric: str,
    mode: Any,
    timesteps: tuple[str, int] | None,
    energy: float | None,
    connection: str | None,
) -> None:
    parts, kept = [], [version for version in catalogue if version.tags["dataset"] == dataset]
    if timesteps is not None:
        op, bound = timesteps
        parts.append(f"timesteps{op}{bound}")
        compare = {"<=": int.__le__, ">": int.__gt__, "==": int.__eq__, "!=": int.__ne__}[op]
        kept = [version for version in kept if compare(int(version.tags["timesteps"]), bound)]
    if energy is not None:
        parts.append(f"energy_mj<{energy}")
        kept = [version for version in kept if version.metrics["energy_mj"] < energy]
    if connection is not None:
        parts.append(f"connection=={connection}")
        kept = [version for version in kept if version.tags["connection"] == connection]
    where = " and ".join(parts) or None
    if not kept:
        with pytest.raises(UserError, match="satisfies where"):
            best("classification", metric, dataset, where, mode, tracking_uri=uri)
        return
    name = "val/top1" if metric == "top1" else metric
    extreme = (max if mode == "max" else min)(version.metrics[name] for version in kept)
    oldest = next(version for version in kept if version.metrics[name] == extreme)
    assert best("classification", metric, dataset, where, mode, tracking_uri=uri) == oldest


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"task": "depth"}, "for task 'depth'; expected one of classification"),
        ({"dataset": "cow"}, "for dataset 'cow'; expected one of .*cat, .*dog"),
        ({"metric": "map50_95"}, "metric 'map50_95'; expected one of .*energy_mj"),
        ({"where": "timestep<=2"}, "no version has the key 'timestep'; did you mean 'timesteps'"),
        ({"where": "timesteps"}, "is not a condition"),
    ],
)
def test_a_question_without_an_answer_says_what_there_is(
    catalogue: list[RegisteredVersion], uri: str, arguments: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        best(**({"task": "classification", "metric": "top1"} | arguments), tracking_uri=uri)  # type: ignore[arg-type]
