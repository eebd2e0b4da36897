"""A version with a flaw gets no alias, on whichever way it comes into the registry, and is never the best one."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from spikefleet.errors import UserError
from spikefleet.registry.api import best, keep_as_challenger, promote, refused_alias, renew, show
from support.registered import DIGITS, Trained, stored_files


def evaluation(path: Path, answers: int) -> dict[str, Path]:
    """An evaluation of 100 images of ten classes, of which only `answers` classes are ever answered."""
    confusion = [[10 if k == row % answers else 0 for k in range(10)] for row in range(10)]
    top1 = answers / 10
    path.write_text(json.dumps({"split": "test", "metrics": {"top1": top1}, "samples": 100, "confusion": confusion}))
    return {"evaluation.json": path}


def aliases(name: str, uri: str) -> dict[int, tuple[str, ...]]:
    return {version.version: version.aliases for version in show(name, tracking_uri=uri).versions if version.aliases}


def test_a_version_with_a_flaw_gets_no_alias(first: Trained, tmp_path: Path) -> None:
    sound = first.again(90, tmp_path).register("flaws", 0.8, extra_files=evaluation(tmp_path / "10", 10))
    flawed = first.again(91, tmp_path).register("flaws", 0.9, extra_files=evaluation(tmp_path / "1", 1))
    assert "flaw" not in sound.tags
    assert flawed.tags["flaw"] == "on test, it answers '0' for all 100 images"
    outcome = promote("flaws", flawed.version, "val/top1", tracking_uri=first.uri)
    assert (outcome.alias, outcome.champion) == (None, None)
    assert outcome.reason == "version 2 must not be used: on test, it answers '0' for all 100 images"
    assert keep_as_challenger("flaws", flawed.version, "no val", tracking_uri=first.uri).alias is None
    assert aliases("flaws", first.uri) == {}
    assert promote("flaws", sound.version, "val/top1", tracking_uri=first.uri).alias == "champion"
    assert keep_as_challenger("flaws", sound.version, "no val", tracking_uri=first.uri).alias == "challenger"


def test_the_best_version_is_none_with_a_flaw(first: Trained, tmp_path: Path) -> None:
    tags = {**first.tags, "dataset": "silence"}
    first.again(92, tmp_path).register("silent", 0.05, tags=tags)
    with pytest.raises(UserError, match="every matching version has a flaw; of models:/silent/1: on val, its top1"):
        best("classification", "top1", "silence", tracking_uri=first.uri)
    sound = first.again(93, tmp_path).register("silent", 0.5, tags=tags)
    assert best("classification", "top1", "silence", mode="min", tracking_uri=first.uri).version == sound.version


def test_without_a_verdict_no_version_becomes_champion(first: Trained, tmp_path: Path) -> None:
    tags = {key: value for key, value in first.tags.items() if key != "spike_driven"}
    version = first.again(94, tmp_path).register("unproved", 0.9, tags=tags)
    outcome = promote("unproved", version.version, "val/top1", tracking_uri=first.uri)
    assert (outcome.alias, outcome.champion) == ("challenger", None)
    assert "without a verdict of the spike check" in outcome.reason


@pytest.mark.parametrize(
    ("name", "change", "kept"),
    [
        ("renewed", {}, ("champion", "mine")),
        ("renewed-unproved", {"spike_driven": None}, ("mine",)),
        ("renewed-refuted", {"spike_driven": "refuted"}, ("mine",)),
        ("renewed-not-shown", {"spike_driven": "not shown"}, ()),
        ("renewed-flawed", {"answers": 1}, ()),
    ],
)
def test_a_renewed_version_gets_no_alias_that_it_must_not_have(
    first: Trained, tmp_path: Path, name: str, change: dict[str, Any], kept: tuple[str, ...]
) -> None:
    """Aliases of a version that an earlier spikefleet registered, or a hand has set, stay where they are."""
    files = evaluation(tmp_path / "evaluation", change.pop("answers", 10))
    tags = {key: value for key, value in {**first.tags, **change}.items() if value is not None}
    old = first.again(95, tmp_path).register(name, 0.9, tags=tags, extra_files=files)
    loader = stored_files(first.uri, old) / "pyfunc_model.py"
    loader.write_text(loader.read_text() + "# of an earlier release\n")
    client = MlflowClient(first.uri, registry_uri=first.uri)
    client.delete_model_version_tag(name, "1", "flaw")  # earlier versions have no such tag
    for alias in ("champion", "mine"):
        client.set_registered_model_alias(name, alias, "1")
    new = renew(f"models:/{name}/1", tracking_uri=first.uri)
    assert (new.version, new.aliases) == (2, kept)
    others = tuple(alias for alias in ("champion", "mine") if alias not in kept)
    assert aliases(name, first.uri).get(1, ()) == others
    assert (refused_alias(new, "champion") is None) is ("champion" in kept)


def test_the_data_sets_name_is_the_tag(first: Trained, tmp_path: Path) -> None:
    data = DIGITS.__class__("coco", "e" * 64, DIGITS.class_names, (), (1, 8, 8), "leaves")
    first.again(96, tmp_path).register("named", data=data)
    found = best("classification", "top1", "leaves", tracking_uri=first.uri)
    assert (found.name, found.tags["dataset"]) == ("named", "leaves")
    with pytest.raises(UserError, match="no version is registered for dataset 'coco'"):
        best("classification", "top1", "coco", tracking_uri=first.uri)
