"""The model card says what a version's files say, and refuses files that are damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from spikefleet.certificates.energy_card import ENERGY as ENERGY_FILE
from spikefleet.errors import UserError
from spikefleet.registry.model_card import (
    CARD_SOURCES,
    ENERGY,
    EVALUATION,
    MOST_CHARACTERS,
    description_of,
    model_card,
    wilson_interval,
)
from spikefleet.registry.package import CARD, CONFIG, read_card
from spikefleet.tasks.task import EVALUATION as EVALUATION_FILE

PACKAGE = Path(__file__).parents[1] / "fixtures" / "format_1" / "model" / "artifacts"


def written(folder: Path, **files: Any) -> Path:
    """A copy of the package of the fixture, whose card lists nothing, with other content in JSON files."""
    package = folder / "package"
    shutil.copytree(PACKAGE, package)
    card = json.loads((package / CARD).read_text())
    card["facts"] |= files.pop("facts", {})
    (package / CARD).write_text(json.dumps({**card, "sha256": {}}))
    for name, content in files.items():
        path = package / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    return package


def text_of(package: Path) -> str:
    return model_card("a model", package, read_card(package))


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (1, 2), (189, 359), (9_999, 10_000)])
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert wilson_interval(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_the_card_says_what_the_files_say() -> None:
    text = text_of(PACKAGE)
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["Use", "Data", "Metrics", "Energy", "Latency", "Proof", "Configuration", "Lineage", "Limits"]
    evaluation = json.loads((PACKAGE / EVALUATION).read_text())
    top1, count = evaluation["metrics"]["top1"], evaluation["samples"]
    low, high = wilson_interval(top1, count)
    assert f"| top1 | test | {top1:.2%} | {count} | {low:.2%} to {high:.2%} |" in text
    row = next(line for line in text.splitlines() if line.startswith("| top1 | val |"))
    assert row.endswith("| - | - |")  # how many images val had is not in the package
    assert json.loads((PACKAGE / "data.json").read_text())["content_hash"] in text
    assert json.loads((PACKAGE / ENERGY).read_text())["constants"]["name"] in text
    facts = json.loads((PACKAGE / CARD).read_text())["facts"]
    assert facts["run_id"] in text
    assert "model.timesteps=2" in text
    assert (EVALUATION, ENERGY) == CARD_SOURCES == (EVALUATION_FILE, ENERGY_FILE)


def test_what_was_not_measured_has_no_number(tmp_path: Path) -> None:
    package = written(tmp_path, facts={"metrics": {}, "tags": {}})
    (package / EVALUATION).unlink()
    (package / ENERGY).unlink()
    text = text_of(package)
    assert "None was registered." in text
    assert "Not measured." in text
    assert "Spike-driven inference: not checked." in text
    assert "optimistic" not in text


def test_metrics_on_test_are_recommended_where_there_are_some(tmp_path: Path) -> None:
    """ImageNet and COCO have labels for val alone."""
    assert "are optimistic; those on test are to be quoted." in text_of(PACKAGE)
    alone = text_of(written(tmp_path, facts={"metrics": {"val/top1": 0.5, "energy_mj": 1.0}}))
    assert "are optimistic." in alone
    assert "to be quoted" not in alone


def test_names_from_elsewhere_stay_on_their_line_and_the_description_fits(tmp_path: Path) -> None:
    names = ["a\n## Use", "\x1b[2J", *(f"class {k} of a long name" for k in range(198))]
    package = written(tmp_path, data={"class_names": names}, facts={"tags": {"proof_x": "y" * 6000}})
    text = text_of(package)
    assert text.count("\n## Use\n") == 1
    assert "\x1b" not in text
    assert "and 160 more" in text
    description = description_of("a model", package, read_card(package))
    assert len(text) > MOST_CHARACTERS >= len(description)
    assert "registry show --card" in description
    assert text.startswith(description.rpartition("\n\nMore: ")[0])


@pytest.mark.parametrize(
    "facts",
    [
        {"metrics": {"val/top1": "high"}},
        {"metrics": {"energy_mj": None, "test/top1": []}},
        {"metrics": {"energy_mj": {}}},
    ],
)
def test_damaged_metadata_is_a_sentence(tmp_path: Path, facts: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is damaged"):
        text_of(written(tmp_path, facts=facts))


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    package = written(tmp_path)
    (package / CONFIG).unlink()
    with pytest.raises(UserError, match=CONFIG):
        text_of(package)


def test_a_flaw_and_the_standing_are_said_first() -> None:
    card = read_card(PACKAGE)
    text = model_card(
        "a model", PACKAGE, card, "it answers '0'\nfor all images", ["It is the champion since today: better"]
    )
    lines = text.splitlines()
    assert lines[2] == r"**Must not be used: it answers '0'\nfor all images.**"
    assert lines[4] == "* It is the champion since today: better."
    assert (
        description_of("a model", PACKAGE, card, "it is silent").splitlines()[2]
        == "**Must not be used: it is silent.**"
    )
    assert "Must not be used" not in text_of(PACKAGE)
