"""Accuracy after each time step, and with the time slices in another order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.recipes import load_config
from spikefleet.config.train_config import TrainConfig
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json
from spikefleet.inference.trained_network import TrainedNetwork, evaluate_on_split
from spikefleet.tasks.classification import OVER_TIME, Classification
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.evaluation import Evaluation, evaluate
from spikefleet_models.families import model_config
from spikefleet_pipelines.events.saccades import Digits, Saccades
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EvaluationPlan
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions
from spikefleet_pipelines.sources.event_sets import EventSetContents
from spikefleet_pipelines.store.event_writer import EventStoreWriter
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig

T = 4
CPU = ProcessGroup(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A few of the digits before the camera."""
    counts = {"train": 200, "val": 40, "test": 50}
    few: Digits = {
        split: (images[: counts[split]], labels[: counts[split]])
        for split, (images, labels) in read_digits(None, DigitsOptions(), 0).splits.items()
    }
    contents, out = EventSetContents(Saccades(few)), tmp_path_factory.mktemp("saccades") / "store"
    with EventStoreWriter(
        out, source="saccades", class_names=contents.class_names, events=contents.events, options={}
    ) as writer:
        contents.write(writer, lambda *both: None, None)
        writer.commit()
    return Store.open(out)


def transform(**fields: object) -> EventsTransformConfig:
    given = {"representation": {"size": (17, 17), "resize": "area", **fields}}
    return EventsTransformConfig.model_validate(given).for_timesteps(T)


def evaluated(store: Store, network: nn.Module, batch: int = 16, **fields: object) -> Evaluation[object, object]:
    loader = BatchLoader(store.samples("test"), transform(**fields), train=False)
    task = Classification(store.manifest.class_names)
    found = evaluate(
        network, task, loader, TrainConfig(epochs=1, global_batch=16, eval_batch=batch), CPU, over_time=True
    )
    assert found is not None
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def network(store: Store) -> nn.Module:
    """Untrained, but with statistics of the data and strong currents, so that neurons fire and answers differ."""
    torch.manual_seed(0)
    made = model_config("small_event_net", timesteps=T).build()
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.constant_(norm.weight, 4)
    loader = BatchLoader(store.samples("train"), transform(), train=False)
    for batch in loader.epoch(EvaluationPlan(samples=200, global_batch=20), 0):
        made(batch.network_input)
    return made.eval()


def test_the_last_answer_is_the_answer(store: Store, network: nn.Module) -> None:
    found = evaluated(store, network)
    task = Classification(store.manifest.class_names)
    details = found.details(task)
    assert details["over_time"] == {"step_ms": 75.0, "top1": list(found.over_time)}
    assert len(found.over_time) == T
    assert found.over_time[-1] == pytest.approx(details["metrics"]["top1"])
    assert details["split"] == "test"


def test_answers_are_those_of_the_first_slices(store: Store, network: nn.Module) -> None:
    """The reference: a network that decodes by rate sees the first k slices alone."""
    loader = BatchLoader(store.samples("test"), transform(), train=False)
    split = store.samples("test")
    (batch,) = loader.epoch(EvaluationPlan(samples=len(split), global_batch=len(split)), 0)
    expected = []
    with torch.no_grad():
        for steps in range(1, T + 1):
            answers = network(batch.network_input[:steps]).argmax(1)
            expected.append(float((answers == batch.targets).double().mean()))
    found = evaluated(store, network, batch=7).over_time
    assert list(found) == pytest.approx(expected)
    assert len(set(expected)) > 1


def test_steps_have_a_length_where_all_recordings_have_one(store: Store, network: nn.Module) -> None:
    assert evaluated(store, network, by="number").step_ms is None
    loader = BatchLoader(store.samples("test"), transform(by="number"), train=False)
    assert loader.step_ms is None


def test_only_networks_on_events_answer_over_time(store: Store) -> None:
    class Last(nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            return frames.sum((0, 3, 4))[:, :1].expand(-1, 10)

    found = evaluated(store, Last())
    assert found.over_time == ()
    assert "over_time" not in found.details(Classification(store.manifest.class_names))


def test_the_plot_is_drawn(store: Store, network: nn.Module, tmp_path: Path) -> None:
    found, task = evaluated(store, network), Classification(store.manifest.class_names)
    details = found.details(task)
    task.report.write(details, found.predictions, found.targets, tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / OVER_TIME).stat().st_size > 2000
    del details["over_time"]
    task.report.write(details, found.predictions, found.targets, tmp_path / "other")  # type: ignore[arg-type]
    assert not (tmp_path / "other" / OVER_TIME).exists()


def test_another_order_of_images_is_refused(tmp_path: Path) -> None:
    data = DataSummary("digits", "0" * 64, tuple("0123456789"))
    trained = TrainedNetwork("mine", nn.Identity(), load_config("digits"), data)
    with pytest.raises(UserError, match="slice_order is reversed, but mine reads 'image', which has no time slices"):
        evaluate_on_split(trained, "test", tmp_path, Console(), slice_order="reversed")


@pytest.mark.slow  # a training and four evaluations: 14 s of processor time
def test_a_run_reports_it_and_evaluate_measures_other_orders(store: Store, tmp_path: Path) -> None:
    runner = CliRunner()
    runs = tmp_path / "runs"
    folders = ["--runs-dir", str(runs), "--stores-dir", str(tmp_path)]
    overrides = [f"data.store={store.location}", "train.epochs=2", "cluster.workers=0", "model.timesteps=4"]
    command = ["train", "saccades_small", *overrides, "--name", "mine", *folders]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    report = runs / "mine" / "report"
    over_time = read_json(report / "evaluation.json")["over_time"]
    assert len(over_time["top1"]) == 4
    assert (report / OVER_TIME).is_file()
    orders = ["--slice-order", "reversed", "--slice-order", "shuffled"]
    result = runner.invoke(app, ["evaluate", "mine", *orders, "--json", *folders])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["over_time"]["top1"] == pytest.approx(over_time["top1"])
    assert list(found["slice_order"]) == ["reversed", "shuffled"]
    told = runner.invoke(app, ["evaluate", "mine", "--slice-order", "reversed", *folders]).stdout
    assert f"slices reversed {found['slice_order']['reversed']['top1']:.2%}" in told
    assert "top1 after each time step: " in told
