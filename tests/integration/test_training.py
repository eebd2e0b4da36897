"""The training core in one process and in several: the same mean gradient, whatever the split of a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from spikefleet.cluster.ray_train import train_on_ray
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.config.schema import Config
from spikefleet.errors import RunError, UserError
from spikefleet.runs.options import Options
from spikefleet.runs.run_dir import Run
from spikefleet.runs.train_run import run_training
from spikefleet.tasks.classification import Classification
from spikefleet.training.checkpoints import CheckpointFolder, Snapshot, load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Event, StepDone
from spikefleet.training.loop import Outcome, train
from spikefleet.training.step import NonFiniteError
from spikefleet_pipelines.sources import prepare
from spikefleet_pipelines.store.reader import Store

SMALL = ["model.width=0.125", "train.epochs=1", "tracking.every_steps=1", "cluster.workers=0"]


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits")


class Steps:
    """Keeps the metrics of each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.rows.append(dict(event.metrics))


GOLDEN = {
    "digits": [2.32604, 2.37644, 2.34926, 2.31248],
    "digits_narrow": [2.28812, 2.32469, 2.33252, 2.31376],
    "digits_spiking_resnet18_shortcut": [2.32162, 2.32399, 2.34925, 2.28904],
}
"""The first losses of the recipes whose data are built in."""


def run(config: Config, store: Store, run_dir: Path) -> tuple[Outcome, Steps]:
    steps = Steps()
    return train(config, store, run_dir, ProcessGroup.single(), steps), steps


def end(run_dir: Path) -> Snapshot:
    latest = CheckpointFolder(run_dir / "checkpoints").latest()
    assert latest is not None
    return load_checkpoint(latest)


def frozen_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm by its running statistics, so that a gradient does not depend on how a batch is cut."""
    from spikefleet_models.sg_resnet import SGResNet

    plain = SGResNet.train

    def train_without_batch_norm(self: SGResNet, mode: bool = True) -> SGResNet:
        plain(self, mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

    monkeypatch.setattr(SGResNet, "train", train_without_batch_norm)


def test_accumulation_gives_the_gradient_of_the_whole_batch(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for the last batch of an epoch, which is smaller and cut unevenly (1,295 samples, 64 a step)."""
    frozen_statistics(monkeypatch)
    ends = []
    for parts in (1, 4):
        config = load_config("digits", parse_overrides([*SMALL, f"train.accumulate={parts}"]))
        _, steps = run(config, store, tmp_path / str(parts))
        ends.append((end(tmp_path / str(parts)), [row["train/loss"] for row in steps.rows]))
    (whole, losses), (cut, cut_losses) = ends
    assert cut_losses[:8] == pytest.approx(losses[:8], rel=1e-4)
    first = next(name for name in whole.tensors["model"] if name.endswith("conv.weight"))
    assert torch.allclose(cut.tensors["model"][first], whole.tensors["model"][first], rtol=1e-2, atol=1e-3)


def test_two_workers_have_the_gradient_of_one(
    store: Store, ray_on_two_cpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, also the last one, whose 15 samples go 7 to one rank and 8 to the other.

    Batch norm is frozen and the rate tiny, so that nothing but the exchange of gradients could make a difference.
    """

    def freeze(group: ProcessGroup, step: int) -> None:
        from spikefleet_models.sg_resnet import SGResNet

        def train_without_batch_norm(self: SGResNet, mode: bool = True) -> SGResNet:
            return self.eval() if mode else torch.nn.Module.train(self, mode)

        SGResNet.train = train_without_batch_norm  # type: ignore[method-assign]

    both = Steps()
    config = load_config("digits", parse_overrides([*SMALL, "cluster.workers=2", "optim.lr=1.0e-7"]))
    train_on_ray(config, store, tmp_path / "two", both, before_step=freeze)
    frozen_statistics(monkeypatch)
    _, alone = run(load_config("digits", parse_overrides([*SMALL, "optim.lr=1.0e-7"])), store, tmp_path / "one")
    norms = [row["gradient/norm"] for row in alone.rows]
    assert len(norms) == 21
    assert [row["gradient/norm"] for row in both.rows] == pytest.approx(norms, rel=1e-3)


class StopTrainingError(Exception):
    """Ends a training in the middle."""


@pytest.mark.parametrize(
    "settings",
    [
        ["train.channels_last=true", "tracking.health_every_steps=3"],
        ["train.precision=fp16"],
        ["train.accumulate=2", "train.ema_decay=0.9"],
        ["data.loader_processes=2"],
        ["shortcut.where=block", "shortcut.combine=convex", "shortcut.schedule=cosine", "train.ema_decay=0.9"],
    ],
)
def test_resumption_is_exact(settings: list[str], store: Store, tmp_path: Path) -> None:
    def stop(group: ProcessGroup, step: int) -> None:
        if step == 11:
            raise StopTrainingError

    config = load_config("digits", parse_overrides([*SMALL, "checkpoint.every_steps=4", *settings]))
    train(config, store, tmp_path / "whole", ProcessGroup.single(), Steps())
    with pytest.raises(StopTrainingError):
        train(config, store, tmp_path / "cut", ProcessGroup.single(), Steps(), before_step=stop)
    train(config, store, tmp_path / "cut", ProcessGroup.single(), Steps())
    whole, cut = end(tmp_path / "whole"), end(tmp_path / "cut")
    assert whole.state == cut.state
    for group, tensors in whole.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, cut.tensors[group][name]), f"{group}: {name}"


def test_same_seed_same_bits_and_another_seed_others(store: Store, tmp_path: Path) -> None:
    one, two, other = (
        run(load_config("digits", parse_overrides([*SMALL, f"train.seed={seed}"])), store, tmp_path / name)[1].rows
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert [row["train/loss"] for row in one] == [row["train/loss"] for row in two]
    assert one[0]["train/loss"] != other[0]["train/loss"]


@pytest.mark.parametrize(
    ("trouble", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError("no proof"), "failed")]
)
def test_a_run_that_ends_during_its_proof_goes_on_from_there(
    trouble: BaseException, status: str, stores_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def certify(*parts: object) -> None:
        raise trouble

    config, options = load_config("digits", parse_overrides(SMALL)), Options(tmp_path / "runs", stores_dir)
    with monkeypatch.context() as patch:
        patch.setattr("spikefleet.runs.train_run.certify", certify)
        with pytest.raises(type(trouble)):
            run_training(config, options, Console(quiet=True), "cut")
    record = Run(tmp_path / "runs" / "cut").record()
    assert record["status"] == status
    finished = run_training(config, options, Console(quiet=True), "cut")
    assert finished.run.record()["status"] == "finished"
    assert finished.promotion is not None


@pytest.mark.parametrize("recipe", GOLDEN)
def test_golden_losses(recipe: str, store: Store, tmp_path: Path) -> None:
    """A refactoring must not move them."""

    class EnoughError(Exception):
        pass

    def stop(group: ProcessGroup, step: int) -> None:
        if step == len(GOLDEN[recipe]):
            raise EnoughError

    config, steps = load_config(recipe, parse_overrides(["tracking.every_steps=1", "cluster.workers=0"])), Steps()
    with pytest.raises(EnoughError):
        train(config, store, tmp_path, ProcessGroup.single(), steps, stop)
    assert [row["train/loss"] for row in steps.rows] == pytest.approx(GOLDEN[recipe], rel=2e-3)


def test_gradient_that_is_not_finite_names_its_parameter(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = Classification.loss
    seen = 0

    def broken(
        self: Classification, network: torch.nn.Module, batch: object, balance: float
    ) -> dict[str, torch.Tensor]:
        nonlocal seen
        seen += 1
        values = healthy(self, network, batch, balance)  # type: ignore[arg-type]
        if seen == 3:  # its value is finite, its slope is not
            bias = network.classifier.bias
            values["loss"] = values["loss"] + (bias - bias.detach()).abs().sqrt().sum()
        return values

    monkeypatch.setattr(Classification, "loss", broken)
    with pytest.raises(NonFiniteError, match=r"gradient is not finite at step 3 \(epoch 1\): classifier.bias;"):
        run(load_config("digits", parse_overrides(SMALL)), store, tmp_path)


def test_side_branches_exist_in_training_only(store: Store, tmp_path: Path) -> None:
    plain, branched = (
        load_config("digits", parse_overrides([*SMALL, *extra]))
        for extra in ([], ["shortcut.where=stage", "shortcut.lambda0=0.5"])
    )
    _, without = run(plain, store, tmp_path / "plain")
    _, steps = run(branched, store, tmp_path / "branched")
    balances = [row["balance_coefficient"] for row in steps.rows]
    assert balances[0] == 0.5
    assert balances == sorted(balances, reverse=True)
    assert 0 < balances[-1] < 0.05
    assert "balance_coefficient" not in without.rows[0]
    ends = [end(tmp_path / name) for name in ("plain", "branched")]
    assert ends[0].tensors["model"].keys() == ends[1].tensors["model"].keys()
    assert "branches" not in ends[0].tensors
    assert ends[1].tensors["branches"].keys() == {f"{k}.{part}" for k in (0, 1) for part in ("weight", "bias")}
    assert steps.rows[0]["train/loss"] != without.rows[0]["train/loss"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns(precision: str, store: Store, tmp_path: Path) -> None:
    outcome, steps = run(
        load_config("digits", parse_overrides([*SMALL, f"train.precision={precision}"])), store, tmp_path
    )
    assert steps.rows[-1]["train/loss"] < steps.rows[0]["train/loss"]
    assert {tensor.dtype for tensor in end(tmp_path).tensors["model"].values()} == {torch.float32, torch.int64}
    assert outcome.steps == 21


def test_wrong_number_of_classes_and_unknown_metric_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.num_classes=7, but the data has 10 classes; set model.num_classes=10"):
        run(load_config("digits", parse_overrides([*SMALL, "model.num_classes=7"])), store, tmp_path)
    with pytest.raises(UserError, match=r"checkpoint.metric='map50'.*top1"):
        run(load_config("digits", parse_overrides([*SMALL, "checkpoint.metric=map50"])), store, tmp_path)


def test_storage_that_refuses_ends_the_run_with_a_sentence(store: Store, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(RunError, match="cannot be written"):
        run(load_config("digits", parse_overrides(SMALL)), store, tmp_path)


def test_health_and_gradients_are_reported(store: Store, tmp_path: Path) -> None:
    outcome, steps = run(
        load_config("digits", parse_overrides([*SMALL, "tracking.health_every_steps=10"])), store, tmp_path
    )
    measured = [row for row in steps.rows if "spikes/firing_rate" in row]
    assert len(measured) == 2
    for row in measured:
        assert 0 < row["spikes/firing_rate"] < 1
        assert {"spikes/dead_fraction", "spikes/saturated_fraction", "gradient/first_layer_norm", "lr"} <= row.keys()
        assert row["gradient/first_layer_norm"] > 0
        assert len(row) <= 12, "a handful of keys, whatever the depth"
    for name in ("confusion.png", "predictions.png", "learning_curve.png", "evaluation.json"):
        assert (tmp_path / "report" / name).stat().st_size > 500
    assert outcome.history[-1]["val/top1"] == outcome.validation["top1"]


@pytest.mark.parametrize("layout", ["false", "true"])
def test_encoded_pictures_of_varying_size(layout: str, tmp_path: Path) -> None:
    """ImageNet's layout and recipe, with a narrow network and small crops."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for name, level in (("bright", 200), ("dark", 60)):
            folder = tmp_path / "raw" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.normal(level, 20, (40 + number, 50, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    store = prepare("image_folder", tmp_path / "raw", tmp_path / "store")
    small = ["model.width=0.125", "model.num_classes=2", "train.epochs=3", "train.global_batch=8", "optim.lr=0.01"]
    crops = ["data.transform.random_resized_crop=32", "data.transform.resize=36", "data.transform.center_crop=32"]
    settings = [*small, *crops, "data.loader_processes=1", "cluster.workers=0", f"train.channels_last={layout}"]
    outcome, _ = run(load_config("imagenet_sg_resnet18", parse_overrides(settings)), store, tmp_path / "run")
    assert outcome.steps == 9
    assert outcome.test["top1"] >= 0.5
