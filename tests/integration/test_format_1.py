"""Versions and checkpoints of the first format keep loading, for ever after."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from spikefleet import registry
from spikefleet.runs.run_dir import Run
from spikefleet.tracking.mlflow_client import resolve_tracking_uri
from spikefleet.training.checkpoints import load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.loop import train
from spikefleet_pipelines.store.reader import Store
from support.events import KeptEvents

FIXTURE = Path(__file__).parent.parent / "fixtures" / "format_1"
LOGITS = torch.tensor(json.loads((FIXTURE / "logits.json").read_text()))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that holds the version, as it was registered then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        runs = tmp_path_factory.mktemp("runs")
        uri = resolve_tracking_uri(runs)
        shutil.copytree(FIXTURE / "model", runs / "model")
        client = MlflowClient(uri, registry_uri=uri)
        run = client.create_run(client.create_experiment("old", artifact_location=(runs / "artifacts").as_uri()))
        client.create_registered_model("format_1")
        tags = json.loads((FIXTURE / "tags.json").read_text())
        client.create_model_version("format_1", (runs / "model").as_uri(), run_id=run.info.run_id, tags=tags)
        client.set_registered_model_alias("format_1", "champion", "1")
        yield uri


def says(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = network(torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0)))
    return logits


@pytest.mark.parametrize("reference", ["models:/format_1/1", "models:/format_1@champion"])
def test_a_version_loads_from_its_registry(uri: str, reference: str) -> None:
    torch.testing.assert_close(says(registry.load(reference, tracking_uri=uri)), LOGITS, rtol=0, atol=2e-5)


def test_a_version_loads_from_its_files() -> None:
    torch.testing.assert_close(says(registry.load(FIXTURE / "model" / "artifacts")), LOGITS, rtol=0, atol=2e-5)


def test_its_own_serving_code_says_what_to_do_and_a_renewed_version_serves(uri: str) -> None:
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with pytest.raises(Exception, match="register it again with `spikefleet registry renew"):
        mlflow.pyfunc.load_model("models:/format_1/1")
    renewed = registry.renew("models:/format_1/1", tracking_uri=uri)
    assert renewed.version == 2
    assert renewed.aliases == ("champion",)
    assert renewed.metrics == registry.show("format_1", tracking_uri=uri).pick(1).metrics
    assert registry.best("classification", "top1", tracking_uri=uri).version == 2  # the one of both that serves
    served = mlflow.pyfunc.load_model("models:/format_1@champion")
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    answers = served.predict(images)
    assert answers.shape == (5, 10)
    np.testing.assert_allclose(answers.sum(axis=1), 1, rtol=1e-5)


def test_a_checkpoint_is_resumed(stores_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    run, events = Run(tmp_path / "run"), KeptEvents()
    config, latest = run.config(), run.checkpoints.latest()
    assert latest is not None
    assert load_checkpoint(latest).state["epoch"] == 1
    train(config, Store.open(stores_dir / "digits"), run.path, ProcessGroup.single(), events)
    expected = json.loads((FIXTURE / "resumed.json").read_text())
    assert {str(step): loss for step, loss in events.losses.items()} == pytest.approx(expected, rel=2e-3)


def test_a_served_version_imports_neither_plots_nor_the_training_core(uri: str, tmp_path: Path) -> None:
    """Who serves needs neither matplotlib nor what trains; asked in a process of its own."""
    program = """
import sys, mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1]); mlflow.set_registry_uri(sys.argv[1])
served = mlflow.pyfunc.load_model("models:/format_1@champion")
served.predict(np.zeros((1, 1, 8, 8), np.uint8))
unwanted = ("matplotlib", "ray", "spikefleet.training", "spikefleet.runs", "spikefleet.cluster", "spikefleet.search")
print(sorted(name for name in unwanted if name in sys.modules))
"""
    if "champion" not in registry.show("format_1", tracking_uri=uri).versions[0].aliases:
        registry.renew("models:/format_1/1", tracking_uri=uri)
    done = subprocess.run(
        [sys.executable, "-c", program, uri], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "[]"
