"""The registry in a real PostgreSQL: registered, indexed, looked up, with aliases; the same answers as in SQLite."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spikefleet.registry.api import list_models, load, promote, ranked, reindex
from spikefleet.registry.lookup_index import INDEXED, is_complete
from support.made_versions import ManyVersions, counted_statements
from support.postgres import missing, postgres
from support.registered import load_network_of, trained

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    with postgres() as uri:
        yield uri


@pytest.fixture(scope="module")
def many(uri: str) -> ManyVersions:
    made = ManyVersions(uri)
    dice = random.Random(0)
    for number in range(8):
        tags = {"timesteps": str(1 + number % 3), "bound": "4", "connection": "bsg"}
        made.add(f"model{number % 2}", tags, {"val/top1": dice.random(), "energy_mj": 80 * dice.random()})
    return made


def test_best_asks_the_index_whatever_the_number_of_versions(many: ManyVersions) -> None:
    where, said = "timesteps<=2 and energy_mj<60 and params_m<25 and connection==bsg", list[str]()

    def ask() -> tuple[list[str], int]:
        with counted_statements() as sent:
            found = ranked(
                "classification", "top1", "digits", where, top=2, tracking_uri=many.uri, announce=said.append
            )
        return [version.uri for version in found], len(sent)

    ask()
    _, few = ask()
    many.multiply(100)
    versions = [version for model in list_models(tracking_uri=many.uri) for version in model.versions]
    assert len(versions) == 100
    kept = [v for v in versions if int(v.tags["timesteps"]) <= 2 and v.metrics["energy_mj"] < 60]
    kept.sort(key=lambda version: -version.metrics["val/top1"])
    assert ask() == ([version.uri for version in kept[:2]], few)
    assert said == []
    many.edit((kept[0].name, kept[0].version), INDEXED, None)
    assert ask()[0] == [version.uri for version in kept[:2]]
    assert [line.partition(";")[0] for line in said] == ["reading all versions: some are not indexed"]
    assert reindex(tracking_uri=many.uri).indexed == 1
    assert is_complete(many.client)


def test_a_network_is_registered_promoted_found_and_loaded(many: ManyVersions, tmp_path: Path) -> None:
    origin = trained(tmp_path, many.uri)
    version = origin.register("digits", 0.99)
    assert promote("digits", version.version, "top1", tracking_uri=many.uri).alias == "champion"
    said: list[str] = []
    (best,) = ranked(
        "classification", "top1", where="run_name==first", top=1, tracking_uri=many.uri, announce=said.append
    )
    assert (best.uri, best.aliases, said) == ("models:/digits/1", ("champion",), [])
    batch = torch.rand(2, 1, 8, 8)
    assert torch.equal(load("models:/digits@champion", tracking_uri=many.uri)(batch), load_network_of(origin)[0](batch))
