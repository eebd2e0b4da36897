"""Training by CUDA graphs: refused where it cannot be, and on a GPU the same training as without them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.train_config import TrainConfig
from spikefleet.errors import UserError
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import Outcome, train
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return prepare("digits", None, tmp_path_factory.mktemp("digits") / "store", train_images=320)


def trained(store: Store, run_dir: Path, group: ProcessGroup, *overrides: str) -> Outcome:
    settings = ["data.options.train_images=320", "train.epochs=3", "cluster.workers=0", "cluster.gpu=true", *overrides]
    return train(load_config("digits", parse_overrides(settings)), store, run_dir, group, NullSink())


@pytest.mark.parametrize(
    ("recipe", "overrides", "reason"),
    [
        ("digits", ["cluster.workers=1"], "needs a GPU; add --gpu, or set train.cuda_graphs=false"),
        ("digits", ["cluster.workers=2", "cluster.gpu=true"], "is for one worker, found cluster.workers=2"),
        ("digits", ["cluster.gpu=true", "train.precision=fp16"], "does not support train.precision=fp16"),
        ("scenes_spike_yolo", ["cluster.gpu=true"], "needs losses of fixed shapes, which task=detection has not"),
    ],
)
def test_graphs_are_refused_before_a_run_begins(recipe: str, overrides: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=f"train.cuda_graphs=true {reason}"):
        load_config(recipe, parse_overrides(["train.cuda_graphs=true", *overrides]))
    load_config(recipe, parse_overrides(overrides))
    assert load_config("digits", parse_overrides(["train.cuda_graphs=true", "cluster.gpu=true"])).train.cuda_graphs


@pytest.mark.parametrize("other", [{"accumulate": 2}, {"compile": True}])
def test_graphs_of_parts_of_a_step_are_refused(other: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="cuda_graphs=true cannot be combined with"):
        TrainConfig.model_validate({"epochs": 1, "global_batch": 8, "cuda_graphs": True, **other})


SETTINGS: tuple[tuple[str, ...], ...] = (
    (),
    ("train.precision=bf16",),
    ("train.clip_norm=1.0", "model.connection=post_add", "model.neuron.kind=lif", "model.decoder=asd"),
    ("shortcut.where=stage", "shortcut.schedule=linear"),
    (
        "shortcut.where=stage",
        "shortcut.combine=convex",
        "shortcut.lambda0=0.25",
        "shortcut.schedule=linear",
        "train.partial_batch=weigh",
    ),
)
"""Of the trainings on a GPU; a falling coefficient is another number in each step."""


@pytest.mark.parametrize("overrides", SETTINGS)
def test_these_settings_can_be_captured(overrides: tuple[str, ...]) -> None:
    assert load_config("digits", parse_overrides(["train.cuda_graphs=true", "cluster.gpu=true", *overrides]))


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", SETTINGS)
def test_a_graph_trains_as_its_kernels_do(overrides: tuple[str, ...], store: Store, tmp_path: Path) -> None:
    """The losses of the epochs: the partial batches in between run without the graph."""
    gpu = ProcessGroup.single(gpu=True)
    losses = {
        graphs: [
            epoch["train/loss"]
            for epoch in trained(
                store, tmp_path / str(graphs), gpu, "train.global_batch=48", f"train.cuda_graphs={graphs}", *overrides
            ).history
        ]
        for graphs in ("true", "false")
    }
    assert losses["true"] == pytest.approx(losses["false"], rel=0.02)
    assert losses["true"][-1] < losses["true"][0]
