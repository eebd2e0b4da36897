"""A champion on digits, and the one that a retraining replaced it with; made once a process, for that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikefleet.retraining.retrain import Retrained
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.splitting import take_split
from support.retrained import Desk


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        desk = Desk(tmp_path_factory.mktemp("desk"))
        whole = prepare("digits", None, desk.root / "stores" / "digits")
        take_split(whole, desk.root / "stores" / "split", "gate", 0.3)
        promotion = desk.train("first").promotion
        assert promotion is not None
        assert (promotion.alias, promotion.reason) == ("champion", "version 1 is the first champion")
        return desk


@pytest.fixture
def desk(trained: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return trained.copy(tmp_path / "desk")


@pytest.fixture(scope="session")
def better(trained: Desk, tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, Retrained]:
    """The champion after a retraining of eight epochs, which is better."""
    desk = trained.copy(tmp_path_factory.mktemp("better") / "desk")
    return desk, desk.retrain(train__epochs=8)


@pytest.fixture(autouse=True)
def tests_draw_nothing(blank_figures: None) -> None:
    """Of what a retraining draws, a test sees the figures of `better`, which is made before this."""
