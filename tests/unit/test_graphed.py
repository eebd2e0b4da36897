"""Training by CUDA graphs: refused where it cannot be, and on a GPU the same training as without them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import TrainConfig
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
    settings = ["data.options.train_images=320", "train.epochs=3", "cluster.workers=0", *overrides]
    return train(load_config("digits", parse_overrides(settings)), store, run_dir, group, NullSink())


def test_without_a_gpu_graphs_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.cuda_graphs=true needs a GPU; set --gpu, or remove it"):
        trained(store, tmp_path, ProcessGroup.single(), "train.cuda_graphs=true")


@pytest.mark.parametrize("other", [{"accumulate": 2}, {"compile": True}])
def test_graphs_of_parts_of_a_step_are_refused(other: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="cuda_graphs=true cannot be combined with"):
        TrainConfig.model_validate({"epochs": 1, "global_batch": 8, "cuda_graphs": True, **other})


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.precision=bf16",),
        ("train.clip_norm=1.0", "model.connection=post_add", "model.neuron.kind=lif", "model.decoder=asd"),
        ("shortcut.where=stage", "shortcut.loss=sum_losses"),
        ("shortcut.where=stage", "shortcut.combine=convex", "train.partial_batch=weigh"),
    ],
)
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
