"""Gradients of every recipe at initialisation and of a checkpoint; `spikefleet gradients`; the warning of training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.config.optim_config import OptimConfig
from spikefleet.config.recipes import list_recipes, load_config
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.runs.run_dir import Run
from spikefleet.tasks.task import Task
from spikefleet.training.checkpoints import load_checkpoint
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import Event, Note, StepDone
from spikefleet.training.gradient_check import GradientCheck, check_gradients, noise_batch, training_batch
from spikefleet.training.loop import train
from spikefleet.training.optimizer import learning_rate, smaller_steps
from spikefleet.training.state import TrainingState
from spikefleet_models.gradient_flow import TRAINABLE
from spikefleet_pipelines.store.reader import Store

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format_1" / "run"
SIDES = {"digits": 8, "scenes": 64, "coco": 64, "cifar10": 16, "cifar100": 16, "fashion_mnist": 16, "image_folder": 64}
SIDES |= {"saccades": 34, "first_digit": 34, "apparent_motion": 34, "saccade_scenes": 64, "dvs_cifar10": 48, "gen1": 64}
GATE = {"sg_resnet": "model.gate_gradient", "retinanet": "model.backbone.gate_gradient"}
EXPLODE_BY_LITERAL_GATES = ("coco_retinanet_sg_resnet34", "imagenet_sg_resnet34", "imagenet_sg_resnet50")
"""At a depth of 34 and more, behind a stem that gathers the gradient of many pixels."""

SATURATE_BEHIND_POOLS = ("dvs_cifar10_7bnet",)
"""The paper's BSG behind max pools: with few channels nearly all spikes are 1 after five, and the last blocks silent.

At full width the recipe passes as it is.
"""


def narrow(recipe: str, **overrides: object) -> Config:
    """The recipe with a quarter of its channels, which change neither depth nor connections."""
    model = load_config(recipe).dump()["model"]
    fields: dict[str, object]
    if model["family"] == "spike_yolo":
        fields = {"model.width": max(model["width"] / 4, 0.0625)}
    elif model["family"] == "retinanet":
        width = model["backbone"]["width"] / 4
        fields = {"model.backbone.width": width, "model.backbone.asd_channel_reduction": 4, "model.fpn_channels": 32}
    elif model["family"] == "seven_b_net":
        fields = {"model.channels": [8] * len(model["channels"]), "model.asd_channel_reduction": 4}
    elif model["family"] == "small_event_net":
        fields = {}
    else:
        fields = {"model.width": model["width"] / 4, "model.asd_channel_reduction": 4}
    return load_config(recipe, {**fields, **overrides})


def on_noise(config: Config) -> GradientCheck:
    side = SIDES[config.data.source]
    batch, data = noise_batch(config, {8: 16, 16: 8, 34: 16}.get(side, 4), side)
    return check_gradients(config, batch, data)


def assert_trainable(check: GradientCheck) -> None:
    assert all(math.isfinite(row.gradient_norm) and math.isfinite(row.relative_step) for row in check.layers)
    assert check.problem is None
    assert TRAINABLE[0] <= check.first_to_last <= TRAINABLE[1]


@pytest.mark.parametrize("recipe", list_recipes())
def test_gradients_of_every_recipe_reach_all_layers_at_initialisation(recipe: str) -> None:
    config = narrow(recipe)
    if recipe in SATURATE_BEHIND_POOLS:
        config = narrow(recipe, **{"model.connection": "iand"})
    assert_trainable(on_noise(config))


@pytest.mark.parametrize("recipe", EXPLODE_BY_LITERAL_GATES)
def test_literal_gates_explode_behind_a_large_stem(recipe: str) -> None:
    config = narrow(recipe, **{GATE[load_config(recipe).model.family]: "literal"})
    with pytest.raises(AssertionError):
        assert_trainable(on_noise(config))


@pytest.mark.parametrize("recipe", ["digits_spiking_resnet18_shortcut", "cifar100_spiking_resnet18_shortcut"])
def test_the_former_peak_of_the_shortcut_recipes_explodes(recipe: str) -> None:
    plain = {"shortcut.where": "none", "model.neuron.alpha": 2.0}
    check = on_noise(narrow(recipe, **plain, **{"model.stages": [3, 4, 6, 3]}))
    assert check.first_to_last > 1e3
    assert check.problem is not None
    assert "explodes at stages.2" in check.problem
    assert f"will hardly train: {check.problem}" in check.findings


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list_recipes())
def test_gradients_of_every_recipe_at_full_width(recipe: str) -> None:
    assert_trainable(on_noise(load_config(recipe)))


# ------------------------------------------------------------------------------------------------ what is measured


class Seen:
    """Keeps steps and notes."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.notes: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.steps.append(dict(event.metrics))
        if isinstance(event, Note):
            self.notes.append(event.text)


@pytest.fixture(scope="module")
def store(stores_dir: Path) -> Store:
    return Store.open(stores_dir / "digits")


def short(recipe: str = "digits", **overrides: object) -> Config:
    fixed = {"model.width": 0.125, "train.epochs": 1, "tracking.every_steps": 1, "cluster.workers": 0}
    return load_config(recipe, {**fixed, **overrides})


@pytest.mark.parametrize("recipe", ["digits", "digits_spiking_resnet18_shortcut"])
def test_the_gradient_is_that_of_the_first_training_step(
    recipe: str, store: Store, tmp_path: Path, no_figures: None
) -> None:
    """With side branches too, on the same images; an epoch of a few steps is enough."""
    config, seen = short(recipe, **{"train.global_batch": 512}), Seen()
    check = check_gradients(config, training_batch(config, store, 512), DataSummary.of(store.manifest))
    train(config, store, tmp_path, ProcessGroup.single(), seen)
    assert check.layers[0].gradient_norm == pytest.approx(seen.steps[0]["gradient/first_layer_norm"], rel=1e-3)
    assert check.layers[0].gradient_norm != pytest.approx(seen.steps[1]["gradient/first_layer_norm"], rel=1e-3)
    assert check.step == 0
    assert check.learning_rate == config.optim.lr


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_relative_step_is_what_plain_sgd_does(clip: float | None, store: Store) -> None:
    config = short(**{"train.clip_norm": clip})
    batch, data = training_batch(config, store, 32), DataSummary.of(store.manifest)
    check = check_gradients(config, batch, data)
    state = TrainingState(config, ProcessGroup.single(), "", 1)
    network = state.train_model.train()
    torch.nn.functional.cross_entropy(network(batch.images), batch.targets).backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    torch.optim.SGD(network.parameters(), lr=config.optim.lr).step()
    assert (check.clipped_to < 1) == (clip is not None)
    for row in check.layers:
        weight, old = network.get_parameter(f"{row.layer}.weight"), before[f"{row.layer}.weight"]
        assert row.relative_step == pytest.approx(((weight - old).norm() / old.norm()).item(), rel=1e-2)


def test_a_summed_loss_counts_the_global_batch() -> None:
    mean, summed = (
        on_noise(narrow("scenes_spike_yolo", **{"train.loss": how, "train.global_batch": 64}))
        for how in ("mean", "sum")
    )
    for one, other in zip(mean.layers, summed.layers, strict=True):
        assert other.gradient_norm == pytest.approx(64 * one.gradient_norm, rel=1e-3, abs=1e-9)


def test_a_checkpoint_is_measured_at_its_weights_and_rate(store: Store) -> None:
    run = Run(FIXTURE)
    config, latest = run.config(), run.checkpoints.latest()
    assert latest is not None
    snapshot, data = load_checkpoint(latest), DataSummary.of(store.manifest)
    batch = training_batch(config, store, 32)
    trained, initial = (check_gradients(config, batch, data, state) for state in (snapshot, None))
    for row in trained.layers:
        norm = snapshot.tensors["model"][f"{row.layer}.weight"].norm().item()
        assert row.weight_norm == pytest.approx(norm, rel=1e-5)
    assert [row.weight_norm for row in trained.layers] != [row.weight_norm for row in initial.layers]
    assert (trained.step, initial.step) == (21, 0)
    assert trained.learning_rate == learning_rate(config.optim, 20, 21, config.train.epochs)


def test_noise_has_targets_inside_the_image_and_of_known_classes() -> None:
    batch, data = noise_batch(load_config("scenes_retinanet"), 3, 64)
    assert batch.images.shape == (3, 3, 64, 64)
    for target in batch.targets:
        assert ((target.boxes >= 0) & (target.boxes <= 64)).all()
        assert (target.boxes[:, 2:] - target.boxes[:, :2]).min() >= 16
        assert target.labels.max() < len(data.class_names) == 10
    again, _ = noise_batch(load_config("scenes_retinanet"), 3, 64)
    assert torch.equal(batch.images, again.images)
    with pytest.raises(UserError, match="multiples of 32"):
        noise_batch(load_config("coco_spike_yolo_n"), 2, 50)


def test_a_task_without_random_targets_says_so() -> None:
    with pytest.raises(UserError, match="no random targets; measure on data"):
        Task.random_targets(None, torch.zeros(1), torch.Generator())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the command


def ask(*words: str, code: int = 0) -> str:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["gradients", *words])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def test_the_command_says_where_gradients_explode_and_draws_them(tmp_path: Path) -> None:
    words = ("cifar100_spiking_resnet34_shortcut", "--noise", "8", "--images", "4", "model.width=0.125")
    said = ask(*words, "--out", str(tmp_path / "flow.png"))
    assert "gradients reach all layers" in said
    assert "stages.3.2.convs.1" in said
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    answer = json.loads(ask(*words, "model.neuron.alpha=2", "shortcut.where=none", "--json"))
    assert answer["problem"].startswith("explodes at ")
    assert answer["findings"][0] == f"will hardly train: {answer['problem']}"
    assert {"layer", "gradient_norm", "firing_rate", "relative_step"} <= answer["layers"][0].keys()
    assert "remedy" not in answer


def test_the_command_opens_a_checkpoint_on_its_data(stores_dir: Path) -> None:
    checkpoint = str(FIXTURE / "checkpoints" / "step-00000021")
    said = ask(checkpoint, "--stores-dir", str(stores_dir), "--images", "16")
    assert "after 21 steps" in said
    assert "a checkpoint has the configuration" in ask(checkpoint, "model.width=1", code=2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("digitz",), "'digitz' is neither a recipe nor a run in runs; did you mean 'digits'"),
        (("cifar10_sg_resnet18", "data.root=nowhere"), "or measure on noise, for example by --noise 32"),
        (("digits", "--noise", "8", "--data", "x"), "--noise 8 needs no data: leave out --data x"),
    ],
)
def test_what_cannot_be_measured_is_said(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert says in " ".join(ask(*words, code=2).split())


# ------------------------------------------------------------------------------------------------ the warning


def test_training_warns_once_of_a_step_larger_than_the_weights(store: Store, tmp_path: Path, no_figures: None) -> None:
    def warnings(**overrides: object) -> list[str]:
        seen, fields = Seen(), {"optim.warmup_epochs": 0, "train.global_batch": 256, **overrides}
        train(short(**fields), store, tmp_path / str(overrides), ProcessGroup.single(), seen)
        return [note for note in seen.notes if "times its weights" in note]

    (hot,) = warnings(**{"optim.lr": 100.0, "train.clip_norm": 1.0})
    assert hot.startswith("step 1 (epoch 1): a step changes ")
    assert "learning rate 100); lower optim.lr or train.clip_norm (1), or set optim.warmup_epochs" in hot
    assert "`spikefleet gradients`" in hot
    assert not warnings(**{"optim.lr": 100.0, "train.clip_norm": 1e-4})  # a small step, of a large gradient
    (adaptive,) = warnings(**{"optim.kind": "adamw", "optim.lr": 10.0, "train.clip_norm": 1e-4})
    assert "learning rate 10); lower optim.lr, or set optim.warmup_epochs" in adaptive
    assert not warnings()


@pytest.mark.parametrize(
    ("optim", "clip", "says"),
    [
        ({}, None, "lower optim.lr, set train.clip_norm, or set optim.warmup_epochs"),
        ({"warmup_epochs": 2}, 0.5, "lower optim.lr or train.clip_norm (0.5), or raise optim.warmup_epochs"),
        ({"kind": "adamw"}, None, "lower optim.lr, or set optim.warmup_epochs"),
        ({"kind": "adamw"}, 1.0, "lower optim.lr, or set optim.warmup_epochs"),
    ],
)
def test_the_remedy_follows_the_configuration(optim: dict[str, Any], clip: float | None, says: str) -> None:
    fields = {"lr": 0.1, "warmup_epochs": 0, **optim}
    assert smaller_steps(OptimConfig(**fields), clip) == says
