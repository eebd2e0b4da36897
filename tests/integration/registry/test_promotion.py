"""Promotion: the better version becomes champion, also when jobs race or are killed."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from spikefleet.errors import UserError
from spikefleet.registry.api import promote, show
from support.registered import Trained


def test_the_champion_changes_only_for_a_better_version(first: Trained, tmp_path: Path) -> None:
    outcomes = []
    for seed, value in enumerate([0.80, 0.85, 0.85, 0.82, 0.90], start=20):
        version = first.again(seed, tmp_path).register("climb", value)
        outcomes.append(promote("climb", version.version, "top1", tracking_uri=first.uri))
    assert [promotion.alias for promotion in outcomes] == [
        "champion",
        "champion",
        "challenger",
        "challenger",
        "champion",
    ]
    assert [promotion.champion for promotion in outcomes] == [1, 2, 2, 2, 5]
    assert outcomes[3].reason == "top1 0.82 of version 4 is not better than 0.85 of champion version 2 (max)"
    model = show("climb", tracking_uri=first.uri)
    assert {version.version: version.aliases for version in model.versions if version.aliases} == {
        5: ("champion",),
        4: ("challenger",),
    }
    again = promote("climb", 5, "top1", tracking_uri=first.uri)
    assert (again.alias, again.reason) == ("champion", "version 5 is already the champion")
    assert promote("climb", 1, "top1", "min", tracking_uri=first.uri).alias == "champion"
    with pytest.raises(UserError, match=r"no metric 'map'; expected one of"):
        promote("climb", 1, "map", tracking_uri=first.uri)
    with pytest.raises(UserError, match="no version 9; expected one of 1, 2, 3, 4, 5"):
        promote("climb", 9, "top1", tracking_uri=first.uri)


def test_a_champion_set_back_by_hand_is_not_replaced_by_the_one_before(first: Trained, tmp_path: Path) -> None:
    for seed, value in enumerate([0.80, 0.95], start=30):
        version = first.again(seed, tmp_path).register("rollback", value)
        promote("rollback", version.version, "top1", tracking_uri=first.uri)
    MlflowClient(first.uri, registry_uri=first.uri).set_registered_model_alias("rollback", "champion", "1")
    third = first.again(32, tmp_path).register("rollback", 0.85)
    assert promote("rollback", third.version, "top1", tracking_uri=first.uri).champion == 3


@pytest.mark.parametrize(("slow", "fast"), [(0.90, 0.95), (0.95, 0.90)])
def test_a_job_waits_until_another_one_has_moved_the_alias(
    first: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: float, fast: float
) -> None:
    """A slow job has decided and is about to move the alias; another one comes and must wait for it."""
    name = f"race{slow}-{fast}"
    for seed, value in enumerate([0.5, slow, fast], start=40):
        first.again(seed, tmp_path).register(name, value)
    promote(name, 1, "top1", tracking_uri=first.uri)
    real = MlflowClient.set_registered_model_alias
    order: list[str] = []
    waits: list[str] = []
    with ThreadPoolExecutor(1) as other:
        jobs: list[Future[Any]] = []

        def slow_job(client: MlflowClient, model: str, alias: str, version: str) -> None:
            if not jobs:
                jobs.append(other.submit(promote, name, 3, "top1", tracking_uri=first.uri, announce=waits.append))
                deadline = time.monotonic() + 30
                while not waits and time.monotonic() < deadline:
                    time.sleep(0.02)
            order.append(f"{alias} {version}")
            real(client, model, alias, version)

        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", slow_job)
        assert promote(name, 2, "top1", tracking_uri=first.uri).alias == "champion"
        second = jobs[0].result()
    assert waits[0].startswith("waiting for the promotion of version 2 (process ")
    assert second.alias == ("champion" if fast > slow else "challenger")
    assert order == ["champion 2", f"{second.alias} 3"]
    champion = show(name, tracking_uri=first.uri).champion
    assert champion is not None
    assert champion.version == (3 if fast > slow else 2)


def test_many_jobs_that_promote_at_once_leave_the_best_one(first: Trained, tmp_path: Path) -> None:
    values = [0.5, 0.91, 0.97, 0.93, 0.95]
    for seed, value in enumerate(values, start=60):
        first.again(seed, tmp_path).register("crowd", value)
    promote("crowd", 1, "top1", tracking_uri=first.uri)
    with ThreadPoolExecutor(4) as jobs:
        outcomes = list(jobs.map(lambda number: promote("crowd", number, "top1", tracking_uri=first.uri), range(2, 6)))
    champion = show("crowd", tracking_uri=first.uri).champion
    assert champion is not None
    assert champion.version == 3
    assert outcomes[1].alias == "champion"


def test_an_alias_that_another_job_writes_at_the_same_time_is_written_after_it(
    first: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow refuses the second of two new rows for one alias."""
    first.again(70, tmp_path).register("raced", 0.9)
    real = MlflowClient.set_registered_model_alias
    raced: list[str] = []

    def lose_the_race(self: MlflowClient, name: str, alias: str, version: str) -> None:
        real(self, name, alias, version)
        if not raced:
            raced.append(alias)
            raise MlflowException("UNIQUE constraint failed: registered_model_aliases.alias")

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lose_the_race)
    assert promote("raced", 1, "top1", tracking_uri=first.uri).alias == "champion"
    assert raced == ["champion"]


def test_a_promotion_that_was_killed_is_repeated_and_leaves_the_way_free(
    first: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, value in enumerate([0.5, 0.9, 0.7], start=50):
        first.again(seed, tmp_path).register("killed", value)
    promote("killed", 1, "top1", tracking_uri=first.uri)

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", kill)
        with pytest.raises(KeyboardInterrupt):
            promote("killed", 2, "top1", tracking_uri=first.uri)
    assert promote("killed", 3, "top1", tracking_uri=first.uri).champion == 3
    assert promote("killed", 2, "top1", tracking_uri=first.uri).champion == 2


def test_a_version_of_which_nothing_is_shown_gets_no_alias(first: Trained, tmp_path: Path) -> None:
    for seed, verdict in enumerate(["proved", "proved", "not shown", "refuted"], start=80):
        tags = {**first.tags, "spike_driven": verdict}
        first.again(seed, tmp_path).register("shown", 0.9 if seed == 80 else 0.8, tags=tags)
    outcomes = [promote("shown", number, "top1", tracking_uri=first.uri) for number in (1, 2, 3)]
    assert [outcome.alias for outcome in outcomes] == ["champion", "challenger", None]
    assert "version 3 shows nothing" in outcomes[2].reason
    assert outcomes[2].champion == 1

    def aliases() -> dict[int, tuple[str, ...]]:
        return {v.version: v.aliases for v in show("shown", tracking_uri=first.uri).versions if v.aliases}

    assert aliases() == {1: ("champion",), 2: ("challenger",)}
    assert promote("shown", 4, "top1", tracking_uri=first.uri).alias == "challenger"
    assert aliases() == {1: ("champion",), 4: ("challenger",)}
