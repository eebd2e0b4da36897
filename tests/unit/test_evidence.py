"""The page of evidence: from recorded results alone, and the one in the repository is that of its results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.errors import UserError
from spikefleet.reproduction import evidence_plots
from spikefleet.reproduction.claim import list_claimed, load_claims
from spikefleet.reproduction.depth_gradients import DepthGradient, DepthGradients
from spikefleet.reproduction.evidence import TableEvidence, collect_evidence
from spikefleet.reproduction.evidence_page import Evidence, as_page, as_verdicts, write_evidence
from spikefleet.reproduction.evidence_plots import draw_evidence
from spikefleet.reproduction.plan import ReproductionPlan, config_of
from spikefleet.reproduction.results import Training, add_results, shipped_results
from spikefleet.reproduction.table import load_table
from spikefleet_models.energy import energy_at_rates
from spikefleet_models.families import build_model

ROOT = Path(__file__).parents[2]
PLOTS = "platform/plots/evidence"

MEANS = {"SG ResNet10": 92.0, "SG ResNet34": 90.0, "Spiking ResNet34": 12.0, "SG ResNet18": 92.1}


GRADIENTS = DepthGradients(
    "digits_narrow",
    {},
    "abc",
    (
        DepthGradient("post-addition", False, 10, 0, 0.1, (0.2, 0.1)),
        DepthGradient("post-addition", False, 34, 0, 0.0, (0.2, 0.0)),
        DepthGradient("BSG", True, 34, 0, 4.0, (0.2, 0.4)),
        DepthGradient("BSG", True, 34, 1, 1.0, (0.2, 0.4)),
    ),
)


def trainings() -> Iterator[Training]:
    """Five seeds of four rows of table 7: 34 layers of Spiking ResNet at chance, and no gain by depth."""
    table = load_table("sg_resnet_table7")
    plan = ReproductionPlan(table, "digits_300")
    for row, (name, mean) in enumerate(MEANS.items()):
        entry = next(table.entries(name))
        first = config_of("digits_narrow", plan.point(entry, 0))
        for seed in range(5):
            config = first.model_copy(update={"train": first.train.model_copy(update={"seed": seed})})
            accuracy = (mean + 0.6 * ((seed * 7 + row * 3) % 5 - 2)) / 100
            yield Training(config, {}, {"test/top1": accuracy}, 60.0, "digits", "d" * 64, "abc", f"t-{row}-{seed}")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    add_results(folder / "paper-digits_300-digits_narrow.parquet", trainings())
    return folder


@pytest.fixture(scope="module")
def found(results: Path) -> list[TableEvidence]:
    return collect_evidence(results)


def test_the_page_in_the_repository_is_that_of_the_recorded_results() -> None:
    """After new results: `spikefleet evidence --plots platform/plots/evidence --force`."""
    page = as_page(Evidence.read(shipped_results()), PLOTS, f"spikefleet evidence --plots {PLOTS}")
    assert (ROOT / "EVIDENCE.md").read_text(encoding="utf-8") == page
    shown = set(re.findall(r"\]\(([^)]+\.png)\)", page))
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / PLOTS).glob("*.png")} == shown


def test_recorded_results_are_small() -> None:
    assert sum(path.stat().st_size for path in shipped_results().glob("*")) < 5_000_000


def test_verdicts_are_of_the_recorded_seeds(found: list[TableEvidence]) -> None:
    verdicts = {(one["table"], one["scale"], one["claim"]): one for one in as_verdicts(found)}
    gate = verdicts["sg_resnet_table7", "digits_300", "gate_trains_34_layers"]
    assert (gate["verdict"], gate["pairs"][0]["seeds"]) == ("holds", 5)
    assert gate["pairs"][0]["difference"] == pytest.approx(78.0, abs=1.0)
    depth = verdicts["sg_resnet_table7", "digits_300", "deeper_sg_resnet_is_better"]
    assert depth["verdict"] in ("not shown at this scale", "contradicted")
    assert verdicts["sg_resnet_table7", "digits_300", "deeper_spiking_resnet_fails"]["verdict"] == "not run yet"
    assert verdicts["sg_resnet_table7", "digits", "gate_trains_34_layers"]["verdict"] == "not run yet"
    # Rows that tables share are there for each: table 8 has SG ResNet, and nothing to compare it with.
    assert verdicts["sg_resnet_table8", "digits_300", "gate_over_iand"]["verdict"] == "not run yet"


def test_the_page_says_what_was_run_and_what_was_not(found: list[TableEvidence], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    plots = write_evidence(Evidence(found, GRADIENTS), tmp_path / "docs" / "page.md", tmp_path / "plots", "COMMAND")
    page = (tmp_path / "docs" / "page.md").read_text()
    assert "Written by `COMMAND` from recorded results; `--force` replaces" in page
    assert "20 trainings, 20 min 00 s in all." in page
    assert "`spikefleet reproduce sg_resnet_table7 --scale digits_300 --seeds 5" in page
    assert "| 34 layers: SG ResNet34 against Spiking ResNet34 | 90 +- 0.95 | 12 +- 0.95 | +78 (" in page
    assert "| +42.96 | +1.8 |" in page
    assert "## Top-1 accuracy of SG ResNet and Spiking ResNet, rate decoding, on `digits_300`" in page
    assert "`digits`, `fashion_mnist_10k`, `fashion_mnist`: judged at `digits_300` instead. `spikefleet" in page
    assert "rows not trained at `digits_300`: Spiking ResNet18; Spiking ResNet10." in page
    table = page.partition("## Top-1")[2].partition("## ")[0]
    assert "It trains 2 rows beyond those recorded, too." in table
    assert "--only" not in table, "the table has one group"
    assert "`train.epochs=32`, `train.global_batch=64`, `data.options.train_images=300`" in page
    assert "`model.gate_gradient=exact`" in page
    assert "rows differ in `model.connection`, `model.stages`." in page
    assert "`shortcut" not in page.partition("## Top-1")[2].partition("## ")[0]
    assert (
        "and 100 gradients neither vanish nor explode. Outside: post-addition, without side branches, 34 layers."
        in page
    )
    assert "| `digits_300` | digits | 20 | 20 min 00 s | abc | dddddddddddd |" in page
    assert "| post-addition | without | 0.1 | 1e-30 |" in page
    assert "| BSG | with | - | 2 |" in page
    assert "](../plots/sg_resnet_table7_digits_300.png)" in page
    # Table 8 shares rows with table 7, and has nothing to compare them with.
    assert "sg_resnet_table8_digits_300.png" not in page
    assert all(path.stat().st_size > 5_000 for path in plots)
    assert {path.name for path in plots} >= {"sg_resnet_table7_digits_300.png", "depth_gradients.png"}
    assert not any("training" in path.name for path in plots)  # no training has an energy card


def test_a_page_without_results_says_so(tmp_path: Path) -> None:
    page = as_page(Evidence(collect_evidence(tmp_path)), "plots", "COMMAND")
    assert "0 trainings, 0 s in all." in page
    assert "There are no recorded results yet." in page
    assert "holds |" not in page.partition("## How to read this")[0]
    claims = [claim for name in list_claimed() for claim in load_claims(load_table(name))]
    assert page.partition("## How to read this")[0].count("| not run yet |") == len(claims)


def test_another_result_is_another_page(results: Path, found: list[TableEvidence], tmp_path: Path) -> None:
    """The comparison with the repository's page would notice one changed accuracy."""
    changed = [replace(one, metrics={"test/top1": one.metrics["test/top1"] + 1e-3}) for one in trainings()]
    add_results(tmp_path / "paper-digits_300-digits_narrow.parquet", changed[:1])
    add_results(tmp_path / "paper-digits_300-digits_narrow.parquet", trainings())
    page = as_page(Evidence(found), "plots", "COMMAND")
    assert as_page(Evidence(collect_evidence(tmp_path)), "plots", "COMMAND") != page
    assert as_page(Evidence(collect_evidence(results)), "plots", "COMMAND") == page


def test_seeds_on_other_data_are_no_pair(tmp_path: Path) -> None:
    moved = [replace(one, data_hash="e" * 64) if one.trial.startswith("t-2") else one for one in trainings()]
    add_results(tmp_path / "paper-digits_300-digits_narrow.parquet", moved)
    verdicts = {(one["claim"], one["scale"]): one["verdict"] for one in as_verdicts(collect_evidence(tmp_path))}
    assert verdicts["gate_trains_34_layers", "digits_300"] == "not run yet"
    assert verdicts["deeper_sg_resnet_is_better", "digits_300"] != "not run yet"


def test_pairs_of_several_versions_of_the_code_are_named(found: list[TableEvidence], tmp_path: Path) -> None:
    assert "versions of the code" not in as_page(Evidence(found), "plots", "COMMAND")
    later = [replace(one, code_version="def") if one.trial == "t-2-3" else one for one in trainings()]
    add_results(tmp_path / "paper-digits_300-digits_narrow.parquet", later)
    page = as_page(Evidence(collect_evidence(tmp_path)), "plots", "COMMAND")
    assert page.count("* 34 layers: trainings of 2 versions of the code (abc, def).") == 1


def test_the_command_writes_the_page(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    words = ["evidence", "--results", str(results), "--out", str(page), "--plots", str(tmp_path / "plots")]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "gate_trains_34_layers" in done.stdout
    assert page.read_text().startswith("# Evidence")
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert "--force to replace it" in " ".join(again.stderr.split())
    assert f"--seeds 5 --results {results}`" in page.read_text()
    words[4] = str(tmp_path / "other.md")
    plot = tmp_path / "plots" / "sg_resnet_table7_digits_300.png"
    plot.write_text("mine")
    refused = CliRunner().invoke(app, words)
    assert (refused.exit_code, plot.read_text()) == (2, "mine")
    assert "--force to replace it" in " ".join(refused.stderr.split())
    missing = CliRunner().invoke(app, ["evidence", "--results", str(tmp_path / "no"), "--out", str(tmp_path / "b.md")])
    assert missing.exit_code == 2
    assert "is not a directory; record results by" in " ".join(missing.stderr.split())


def test_firing_rates_and_the_balance_coefficient_are_drawn(tmp_path: Path) -> None:
    network = build_model(config_of("digits", {"model.width": 0.125, "model.stages": [1]}).model)
    history = ({"epoch": 0.0, "balance_coefficient": 0.25}, {"epoch": 1.0, "balance_coefficient": 0.0})
    card = energy_at_rates(network, (8, 8), 0.1, "fp32-45nm")
    with_cards = [replace(one, history=history, card=card) for one in trainings()]
    add_results(tmp_path / "paper-digits_300-digits_narrow.parquet", with_cards)
    evidence = collect_evidence(tmp_path)
    drawn = {path.name: path for one in evidence for path in draw_evidence(one, tmp_path)}
    assert drawn["sg_resnet_table7_digits_300_training.png"].stat().st_size > 5_000
    page = as_page(Evidence(evidence), "plots", "COMMAND")
    assert "](plots/sg_resnet_table7_digits_300_training.png)" in page


def test_a_plot_that_cannot_be_drawn_is_not_linked(
    found: list[TableEvidence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("no canvas")

    monkeypatch.setattr(evidence_plots, "subplots", fails)
    assert write_evidence(Evidence(found, GRADIENTS), tmp_path / "page.md", tmp_path / "plots", "COMMAND") == []
    page = (tmp_path / "page.md").read_text()
    assert ".png" not in page
    assert page.count("the plot could not be drawn.") == 2


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "paper-digits_300-digits_narrow.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"paper-digits_300-digits_narrow\.parquet is not a file of results"):
        collect_evidence(tmp_path)


def test_rows_that_seeds_scatter_are_listed_by_seed(tmp_path: Path) -> None:
    """Where some seeds train and others stay at chance, a mean describes no network."""
    accuracies = {0: 0.1, 1: 0.61, 2: 0.4, 3: 0.1, 4: 0.64}
    torn = [
        replace(one, metrics={"test/top1": accuracies[one.seed]}) if one.trial.startswith("t-2") else one
        for one in trainings()
    ]
    add_results(tmp_path / "paper-digits_300-digits_narrow.parquet", torn)
    page = as_page(Evidence(collect_evidence(tmp_path)), "plots", "COMMAND")
    assert page.count("by seed: ") == 1
    assert "* Spiking ResNet34, top-1 by seed: 10, 61, 40, 10, 64 %." in page
