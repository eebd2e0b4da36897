"""The registry behind a real MLflow server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

from spikefleet.registry.api import best, describe, list_models, load, promote, pull, ranked, reindex
from support.mlflow_server import Server
from support.registered import load_network_of, trained


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with Server(tmp_path) as server:
        server.start()
        yield server.uri


def test_the_registry_behind_a_server(server: str, tmp_path: Path, images: np.ndarray[Any, Any]) -> None:
    origin = trained(tmp_path, server)
    version = origin.register("digits")
    assert origin.register("digits") == version
    assert promote("digits", 1, "top1", tracking_uri=server).alias == "champion"
    better = origin.again(1, tmp_path).register("digits", 0.99)
    assert promote("digits", better.version, "top1", tracking_uri=server).champion == 2
    assert best("classification", "top1", where="timesteps==4", tracking_uri=server).version == 2
    said: list[str] = []
    where = "timesteps==4 and params_m<1 and recipe==digits"
    (found,) = ranked("classification", "top1", where=where, top=1, tracking_uri=server, announce=said.append)
    assert (found.uri, found.aliases, said) == ("models:/digits/2", ("champion",), [])
    assert reindex(tracking_uri=server).indexed == 0
    assert [model.name for model in list_models(tracking_uri=server)] == ["digits"]

    batch = torch.rand(2, 1, 8, 8)
    network = load("models:/digits/1", tracking_uri=server)
    assert torch.equal(network(batch), load_network_of(origin)[0](batch))
    pulled = pull("models:/digits@champion", tmp_path / "pulled", tracking_uri=server)
    assert describe(pulled)["sha256"] == describe("models:/digits/2", tracking_uri=server)["sha256"]
    mlflow.set_tracking_uri(server)
    assert mlflow.pyfunc.load_model("models:/digits@champion").predict(images).shape == (5, 10)
