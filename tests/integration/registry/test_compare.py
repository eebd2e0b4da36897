"""Two registered versions side by side, and what is said where they cannot be compared image by image."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spikefleet.audit.comparison import compare
from spikefleet.cli import app
from spikefleet.errors import UserError
from spikefleet.registry.api import RegisteredVersion, pull
from spikefleet.tasks.per_image import PER_IMAGE, PerImage
from support.registered import DIGITS, Trained, stored_files
from support.results import with_classes


def report(folder: Path, results: PerImage, top1: float) -> dict[str, Path]:
    """The files of a report: the evaluation, and its results by image."""
    folder.mkdir()
    classes = [{"name": str(k), "samples": 10, "top1": top1 - k / 100} for k in range(10)]
    evaluation = {"split": "test", "metrics": {"top1": top1}, "samples": len(results.rows), "classes": classes}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    results.write(folder / PER_IMAGE)
    return {name: folder / name for name in ("evaluation.json", PER_IMAGE)}


@pytest.fixture(scope="module")
def two(first: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[RegisteredVersion, RegisteredVersion]:
    """Two versions of one model: 300 and 380 of the same 400 images right, of T=4 and T=2."""
    folder = tmp_path_factory.mktemp("two")
    files = report(folder / "a", with_classes(400, 300), 0.75), report(folder / "b", with_classes(400, 380), 0.95)
    before = first.again(70, folder).register("compared", 0.75, extra_files=files[0])
    after = first.again(71, folder, timesteps=2).register("compared", 0.95, extra_files=files[1])
    return before, after


def test_versions_side_by_side(two: tuple[RegisteredVersion, RegisteredVersion], uri: str, tmp_path: Path) -> None:
    found = compare("models:/compared/1", "models:/compared/2", tracking_uri=uri)
    assert found.metrics["val/top1"] == (0.75, 0.95)
    assert found.metrics["timesteps"] == (4.0, 2.0)
    assert found.metrics["parameters"] == tuple(float(version.tags["parameters"]) for version in two)
    assert found.config == {"model.timesteps": (4, 2)}
    assert found.classes["3"] == pytest.approx((0.72, 0.92))
    assert found.paired is not None
    assert (found.paired.gained, found.paired.lost) == (80, 0)
    assert found.conclusion.startswith("the second one is better by more than chance: test/top1 75.00% and 95.00%")
    pulled = pull("models:/compared/1", tmp_path / "pulled", tracking_uri=uri)
    again = compare(pulled, "models:/compared/2", tracking_uri=uri).to_dict()
    assert {**again, "first": None} == {**found.to_dict(), "first": None}


def test_the_command(
    two: tuple[RegisteredVersion, RegisteredVersion], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = ["registry", "compare", "compared/1", "models:/compared/2", "--runs-dir", str(runs)]
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, words)
    assert done.exit_code == 0, done.output
    for text in ("val/top1", "+20.00%", "model.timesteps", "right by the second alone: 80 images", "better by more"):
        assert text in done.output, text
    plain = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert plain["config"] == {"model.timesteps": {"first": 4, "second": 2}}
    assert plain["metrics"]["val/top1"] == {"first": 0.75, "second": 0.95, "difference": pytest.approx(0.2)}
    assert plain["paired"]["p_value"] < 1e-20
    assert plain["unpaired"] is None


def test_a_version_without_results_by_image_is_compared_by_its_metrics(
    first: Trained, two: tuple[RegisteredVersion, RegisteredVersion], uri: str, tmp_path: Path
) -> None:
    first.again(72, tmp_path).register("compared_bare", 0.6)
    found = compare("models:/compared_bare/1", "models:/compared/2", tracking_uri=uri)
    assert found.paired is None
    assert found.conclusion == (
        "not compared image by image: models:/compared_bare/1 came without results by image (evaluation.npz), as "
        "versions of earlier releases do"
    )
    assert found.metrics["val/top1"] == (0.6, 0.95)
    assert found.classes == {}


def test_other_data_are_named(
    first: Trained, two: tuple[RegisteredVersion, RegisteredVersion], uri: str, tmp_path: Path
) -> None:
    other: dict[str, Any] = {"data": replace(DIGITS, content_hash="e" * 64)}
    files = report(tmp_path / "c", with_classes(400, 390, data_hash="e" * 64), 0.975)
    first.again(73, tmp_path).register("compared_elsewhere", 0.99, extra_files=files, **other)
    found = compare("models:/compared/2", "models:/compared_elsewhere/1", tracking_uri=uri)
    assert not found.same_data
    assert "measured on different data" in found.conclusion
    assert "a difference says little" in found.conclusion


def test_results_that_were_swapped_are_not_compared(first: Trained, uri: str, tmp_path: Path) -> None:
    files = report(tmp_path / "d", with_classes(400, 390), 0.975)
    version = first.again(74, tmp_path).register("compared_swapped", 0.9, extra_files=files)
    assert compare(version.uri, version.uri, tracking_uri=uri).paired is not None
    with_classes(400, 400).write(stored_files(uri, version) / "artifacts" / PER_IMAGE)
    with pytest.raises(UserError, match=r"evaluation\.npz is not the registered file"):
        compare(version.uri, version.uri, tracking_uri=uri)
