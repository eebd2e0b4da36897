"""What keeps a network from an alias: it finds nothing, is silent, or answers by chance; and a missing verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikefleet.certificates.verdict import NOT_SHOWN, NOT_SPIKING, PROVED, REFUTED
from spikefleet.registry.flaws import find_flaw
from spikefleet.registry.promotion import Candidate, Mode, barred, decide
from spikefleet.tasks.classification import Classification, Ranking
from spikefleet.tasks.detection import Detection
from spikefleet_models.energy import energy_card
from spikefleet_models.families import build_model, model_config
from spikefleet_models.sg_resnet_config import SGResNetConfig


def classifier(classes: int) -> Classification:
    return Classification([f"class {k}" for k in range(classes)])


def flaw_of(answers: Any, targets: Any, classes: int) -> str | None:
    """The flaw of a classifier that gave these answers."""
    task = classifier(classes)
    found = task.details([Ranking((int(answer),), (1.0,)) for answer in answers], list(map(int, targets)))
    return task.flaw(json.loads(json.dumps(found)))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_one_answer_for_all_images_is_a_flaw(classes: int) -> None:
    targets = np.arange(200) % classes
    assert flaw_of(np.full(200, 1), targets, classes) == "it answers 'class 1' for all 200 images"
    assert flaw_of(targets, targets, classes) is None
    rare = np.where(np.arange(200) % 10, 0, 1)  # one answer is right for nine of ten images
    assert flaw_of(np.zeros(200), rare, classes) == "it answers 'class 0' for all 200 images"


@pytest.mark.parametrize(("classes", "images"), [(2, 400), (3, 300), (5, 500)])
def test_random_answers_are_a_flaw_and_knowledge_is_none(classes: int, images: int) -> None:
    """Of 60 random classifiers nearly all are found; with a fifth of the answers known, none is."""
    rng = np.random.default_rng(classes)
    targets = np.arange(images) % classes
    flawed = known = 0
    for _ in range(60):
        answers = rng.integers(0, classes, images)
        flawed += flaw_of(answers, targets, classes) is not None
        known += flaw_of(np.where(rng.random(images) < 0.2, targets, answers), targets, classes) is None
    assert flawed >= 56
    assert known >= 58


def test_a_rare_class_is_no_flaw_by_itself() -> None:
    """On unequal classes top-1 says little: the mean over the classes counts."""
    targets = np.array([0] * 950 + [1] * 50)
    found = targets.copy()
    found[950:975] = 0  # it finds half of the rare ones
    assert flaw_of(found, targets, 2) is None
    guessed = np.array(([0] * 19 + [1]) * 50)  # as many rare answers as there are, at random
    assert "is not above chance" in str(flaw_of(guessed, targets, 2))


@pytest.mark.parametrize(("right", "flawed"), [(4, False), (3, True)])
def test_few_images_can_be_answered_well(right: int, flawed: bool) -> None:
    targets = np.array([0, 1, 0, 1])
    answers = np.where(np.arange(4) < right, targets, 1 - targets)
    assert (flaw_of(answers, targets, 2) is not None) is flawed


def test_images_of_one_class_say_nothing() -> None:
    assert flaw_of(np.zeros(50), np.zeros(50), 3) is None


@pytest.mark.parametrize(
    ("evaluation", "flawed"),
    [
        ({"metrics": {"top1": 0.1}}, True),
        ({"metrics": {"top1": 0.0}}, True),
        ({"metrics": {"top1": 0.11}}, False),
        ({"metrics": {"top1": "much"}}, False),
        ({"metrics": []}, False),
        ({}, False),
        ({"metrics": {"top1": 0.1}, "confusion": [[1, 2], [3, 4]]}, True),  # of other classes: top1 is left
        ({"metrics": {"top1": 0.5}, "confusion": [["a"]]}, False),
        ({"metrics": {"top1": 0.5}, "confusion": [[-1] * 10] * 10}, False),
        ({"metrics": {"top1": 0.5}, "confusion": [[10**30] * 10] * 10}, False),
    ],
)
def test_metrics_alone_and_files_of_another_shape(evaluation: dict[str, Any], flawed: bool) -> None:
    assert (classifier(10).flaw(evaluation) is not None) is flawed


@pytest.mark.parametrize(
    ("metrics", "flawed"),
    [
        ({"map50": 0.0}, True),
        ({"map50": 0.00009}, True),
        ({"map50": 0.0001}, False),
        ({"map50": 0.4}, False),
        ({}, False),
    ],
)
def test_a_detector_that_finds_nothing(metrics: dict[str, float], flawed: bool) -> None:
    task = Detection(model_config("spike_yolo_n").build_criterion(), ["leaf"], [1])
    assert (task.flaw({"metrics": metrics}) is not None) is flawed
    named = {f"val/{name}": value for name, value in metrics.items()}
    assert (find_flaw(task, named, {}) is not None) is flawed


# --------------------------------------------------------------------------------------------------------- silence


def card_of(threshold: float, folder: Path) -> dict[str, Path]:
    """The energy card of a tiny network whose neurons fire at this threshold."""
    torch.manual_seed(0)
    base = model_config("sg_resnet_tiny", stages=(1, 1))
    assert isinstance(base, SGResNetConfig)
    network = build_model(base.model_copy(update={"neuron": base.neuron.model_copy(update={"v_threshold": threshold})}))
    card = energy_card(network.eval(), [torch.rand(1, 1, 8, 8) * 4], "fp32-45nm", "merged", True)
    (folder / "energy.json").write_text(json.dumps(card.to_dict()))
    return {"energy.json": folder / "energy.json"}


def test_a_silent_network_has_a_flaw(tmp_path: Path) -> None:
    metrics = {"val/top1": 0.9}
    assert find_flaw(classifier(10), metrics, card_of(0.05, tmp_path)) is None
    assert str(find_flaw(classifier(10), metrics, card_of(1e6, tmp_path))).startswith(
        "it is silent: its layers receive"
    )
    both = str(find_flaw(classifier(10), {"val/top1": 0.05}, card_of(1e6, tmp_path)))
    assert both.startswith("on val, its top1 of 5.00%")
    assert "; it is silent" in both


@pytest.mark.parametrize(("share", "silent"), [(0.0009, True), (0.0011, False)])
def test_silence_is_less_than_a_thousandth_of_the_possible_spikes(share: float, silent: bool, tmp_path: Path) -> None:
    files = card_of(0.05, tmp_path)
    card = json.loads(files["energy.json"].read_text())
    for layer in card["layers"]:
        if layer["spike_fed"]:
            layer["accumulated"] = layer["dense"] * share * card["bound"]
    files["energy.json"].write_text(json.dumps(card))
    assert (find_flaw(classifier(10), {"val/top1": 0.9}, files) is not None) is silent


def test_files_of_another_content_say_nothing(tmp_path: Path) -> None:
    for name in ("energy.json", "evaluation.json"):
        (tmp_path / name).write_text('["mine"]')
    files = {name: tmp_path / name for name in ("energy.json", "evaluation.json")}
    assert find_flaw(classifier(10), {"val/top1": 0.9}, files) is None
    assert find_flaw(classifier(10), {"test/top1": 0.05}, files) is not None


# -------------------------------------------------------------------------------------------------------- the rule


SOUND = Candidate(2, 0.9, "d", PROVED)


def test_only_a_verdict_makes_a_champion() -> None:
    for verdict, alias in (
        (PROVED, "champion"),
        (NOT_SPIKING, "champion"),
        (REFUTED, "challenger"),
        (None, "challenger"),
        ("", "challenger"),
        ("Proved", "challenger"),
        (NOT_SHOWN, None),
    ):
        candidate = replace(SOUND, verdict=verdict)
        assert decide(None, candidate, "val/top1", "max").alias == alias
        assert (barred(candidate) is None) is (alias == "champion")
    assert (
        "without a verdict of the spike check" in decide(None, replace(SOUND, verdict=None), "val/top1", "max").reason
    )


@pytest.mark.parametrize("verdict", [PROVED, REFUTED, NOT_SHOWN, NOT_SPIKING, None])
def test_a_flaw_forbids_every_alias(verdict: str | None) -> None:
    flawed = replace(SOUND, verdict=verdict, flaw="it is silent")
    decision = decide(None, flawed, "val/top1", "max")
    assert (decision.alias, decision.reason) == (None, "version 2 must not be used: it is silent")


@pytest.mark.parametrize(("mode", "alias"), [("max", None), ("min", "champion")])
def test_a_metric_of_zero_is_nothing_found(mode: Mode, alias: str | None) -> None:
    """Also of a version that was registered before there were flaws; an error of zero is the best."""
    assert decide(None, replace(SOUND, value=0.0), "val/map50_95", mode).alias == alias
    assert decide(None, replace(SOUND, value=0.01), "val/map50_95", mode).alias == "champion"
