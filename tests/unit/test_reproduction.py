"""Tables of the papers: what stands for each row, what is counted exactly, and what a report says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.reproduction.plan import ReproductionPlan, config_of, distinct_trainings
from spikefleet.reproduction.report import _panels, as_data, as_markdown, order_sentences, write_reproduction
from spikefleet.reproduction.results import Training
from spikefleet.reproduction.rows import Cell, ReproducedRow, Reproduction, cells_of, measured_row, split_of
from spikefleet.reproduction.scales import Scale
from spikefleet.reproduction.table import PaperTable, list_tables, load_table
from spikefleet.reproduction.trained import differs as trained_otherwise
from spikefleet.reproduction.trained import trainings_of
from spikefleet.runs.options import Options
from spikefleet.runs.run_dir import Run
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.result import SearchResult
from spikefleet_tune.search_file import search_of


@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for name in list_tables() for scale in load_table(name).scales]
)
def test_each_row_can_run_at_its_scales_or_says_why_not(name: str, scale: Scale) -> None:
    table = load_table(name)
    digests = set()
    for entry in table.entries():
        refusal = entry.group.refusal(entry.row, scale)
        if refusal is None:
            config = config_of(entry.group.scales[scale].recipe, entry.group.overrides(entry.row, scale))
            assert (entry.group.name, config.digest()) not in digests, "two rows are the same training"
            digests.add((entry.group.name, config.digest()))
        else:
            assert len(refusal) > 10


def test_tables_have_the_scales_of_their_tasks() -> None:
    assert load_table("sg_resnet_table3").scales == ("digits", "fashion_mnist", "full")
    assert load_table("sg_resnet_table9").scales == (
        "digits",
        "digits_300",
        "fashion_mnist_10k",
        "fashion_mnist",
        "full",
    )
    assert load_table("spike_yolo_table1").scales == ("scenes", "full")
    assert load_table("spike_yolo_table1").scale(None) == "scenes"
    assert load_table("sg_resnet_table9").scale(None) == "digits"
    assert load_table("sg_resnet_table9").scale("full") == "full"
    assert load_table("spike_yolo_table4").scales == ("scenes", "saccade_scenes", "full")


def test_the_old_name_of_a_scale_is_refused_with_the_new_one() -> None:
    for number in (1, 4, 5):
        with pytest.raises(UserError, match=rf"'digits' of spike_yolo_table{number} was renamed; use --scale scenes"):
            load_table(f"spike_yolo_table{number}").scale("digits")
    with pytest.raises(UserError, match="has no scale 'fashion_mnist'; use one of scenes, full"):
        load_table("spike_yolo_table1").scale("fashion_mnist")
    with pytest.raises(UserError, match="has no scale 'scenes'; use one of digits, digits_300, fashion_mnist_10k,"):
        load_table("sg_resnet_table9").scale("scenes")


def test_few_images_are_named_and_are_one_store() -> None:
    """A search has one store, so what selects its data is no part of its points; the row says how many images."""
    table = load_table("sg_resnet_table9")
    plan = ReproductionPlan(table, "digits_300", seeds=1)
    entry = next(table.entries("SG ResNet10, BSG"))
    assert plan.data_of(entry) == {"data.options.train_images": 300}
    ((point, config),) = distinct_trainings(plan, [entry])
    assert config.data.options["train_images"] == 300
    assert {key for key in point if key.startswith("data.")} == set()
    row = measured_row(plan, entry, {}, {})
    assert (row.name, row.same_data) == ("digits (300 training images): SG ResNet10, BSG", False)
    more = ReproductionPlan(table, "digits", overrides={"data.options.train_images": 1000})
    assert measured_row(more, entry, {}, {}).name == "digits (1,000 training images): SG ResNet10, BSG"
    assert measured_row(ReproductionPlan(table, "digits"), entry, {}, {}).name == "digits: SG ResNet10, BSG"
    assert measured_row(ReproductionPlan(table, "full"), entry, {}, {}).same_data
    tree = table.model_dump(by_alias=True)
    tree["groups"][1]["scales"]["digits_300"]["overrides"] = {"data.options.train_images": 200}
    with pytest.raises(ValueError, match="groups with recipe digits_narrow have other data at scale digits_300"):
        PaperTable.model_validate(tree)


def test_rows_on_events_say_what_data_they_need() -> None:
    (dvs,) = load_table("sg_resnet_table3").entries("DVS*")
    assert "data prepare dvs_cifar10 DIR" in (dvs.group.refusal(dvs.row, "digits") or "")
    assert dvs.group.refusal(dvs.row, "full") is None
    assert dvs.group.scales["full"].recipe == "dvs_cifar10_7bnet"
    for entry in load_table("spike_yolo_table4").entries():
        recipe = entry.group.scales["full"].recipe
        config = config_of(recipe, entry.group.overrides(entry.row, "full"))
        assert (config.data.source, config.data.transform.kind) == ("gen1", "event_detection")


def test_all_tables_are_here() -> None:
    sg_resnet = {f"sg_resnet_table{number}" for number in (3, 5, 6, 7, 8, 9)}
    assert set(list_tables()) == sg_resnet | {"shortcut_table1", *(f"spike_yolo_table{number}" for number in (1, 4, 5))}
    with pytest.raises(UserError, match="did you mean 'sg_resnet_table3'"):
        load_table("sg_resnet_tabel3")


@pytest.mark.parametrize(
    ("name", "column", "figures"),
    [
        ("sg_resnet_table5", "parameters", [11.220132, 11.253030]),
        ("sg_resnet_table5", "macs", [549.177344, 1.903]),
        ("sg_resnet_table5", "energy_uj", [1702.45, 40.79]),
        ("spike_yolo_table1", "parameters", [13.271632, *[23.153024] * 4, 47.841856, 68.4784]),
        ("spike_yolo_table5", "parameters", [23.153024, 23.179, 19.918, 24.505, 21.235]),
    ],
)
def test_what_takes_no_training_is_exact(name: str, column: str, figures: list[float]) -> None:
    table = load_table(name)
    cells = [cells_of(table, entry, [])[column] for entry in table.entries()]
    assert [cell.mean for cell in cells] == pytest.approx(figures, rel=1e-3)
    assert [cell.values[0] for cell in cells] == pytest.approx([cell.paper for cell in cells], rel=0.01)


def test_tables_share_their_trainings() -> None:
    """Table 6's column of rate decoding, and the left columns of 7, 8 and 9, are the same networks."""

    def points(name: str) -> set[str]:
        plan = ReproductionPlan(load_table(name), "digits", seeds=2)
        rows = list(plan.table.entries("CIFAR-100*"))
        return {config.digest() for _, config in distinct_trainings(plan, rows)}

    shared = points("sg_resnet_table6") & points("sg_resnet_table7") & points("sg_resnet_table8")
    assert len(shared & points("sg_resnet_table9")) == 3 * 2
    assert points("sg_resnet_table3") < points("sg_resnet_table6")
    assert len(points("sg_resnet_table8")) == 9 * 2


def test_other_data_are_the_same_for_all_trainings_of_a_search() -> None:
    plan = ReproductionPlan(
        load_table("sg_resnet_table7"), "digits", seeds=1, overrides={"data.seed": 3, "data.transform.crop_padding": 1}
    )
    assert plan.data == {"data.seed": 3}
    for point, _ in distinct_trainings(plan, list(plan.table.entries())):
        assert "data.seed" not in point
        assert point["data.transform.crop_padding"] == 1


def test_seeds_come_one_after_the_other() -> None:
    plan = ReproductionPlan(load_table("sg_resnet_table7"), "digits", seeds=2)
    seeds = [point["train.seed"] for point, _ in distinct_trainings(plan, list(plan.table.entries()))]
    assert seeds == [0] * 6 + [1] * 6


def reproduction(means: dict[str, float], scale: Scale = "digits") -> Reproduction:
    """Table 9 with our metrics for some rows: on digits, or at full scale on the paper's data set."""
    plan = ReproductionPlan(load_table("sg_resnet_table9"), scale, seeds=2)
    rows, data, same = [], "cifar100" if scale == "full" else "digits", scale == "full"
    for entry in plan.table.entries():
        paper = entry.row.paper.get("test/top1", 74.0)
        name = entry.row.name
        if name in means:
            cells = {"test/top1": Cell(paper, (means[name] - 1, means[name] + 1), same)}
            trials, hashes = ("t-0", "t-1"), ("d" * 64,)
            rows.append(
                ReproducedRow(entry, cells, (0, 1), trials, hashes, ("abc",), "test", data=data, same_data=same)
            )
        else:
            cells = {"test/top1": Cell(paper, same_data=same)}
            remark = "not run: its data are not there"
            rows.append(ReproducedRow(entry, cells, remark=remark, data=data, same_data=same))
    return Reproduction(plan, tuple(rows))


def test_the_order_of_rows_is_told_from_the_means() -> None:
    agreeing = reproduction({"SG ResNet10, BSG": 90.0, "SG ResNet18, BSG": 95.0, "SG ResNet34, BSG": 99.0})
    assert agreeing.pairs_in_order("test/top1") == (3, 3)
    reversed_ = reproduction({"SG ResNet10, BSG": 99.0, "SG ResNet18, BSG": 95.0, "SG ResNet34, BSG": 90.0})
    assert reversed_.pairs_in_order("test/top1") == (0, 3)
    assert list(order_sentences(reversed_)) == ["top-1: 0 of 3 pairs of rows in the paper's order"]
    assert reproduction({"SG ResNet10, BSG": 99.0}).pairs_in_order("test/top1") == (0, 0)


def test_a_report_says_what_was_not_run_and_where_figures_come_from(tmp_path: Path) -> None:
    found = reproduction({"SG ResNet10, BSG": 90.0, "SG ResNet18, BSG": 95.0})
    text = as_markdown(found)
    assert "| digits: SG ResNet18, BSG | 95 ± 1.4 | 74.62 | CIFAR-100 | 0 1 |  |" in text
    assert text.count("not run: its data are not there") == 4 + 12  # the gates' gradients are another group
    assert "| digits: SG ResNet18, BSG | t-0, t-1 | test | dddddddddddd | abc |" in text
    assert "Measured on val" not in text
    assert "The data differs from the paper's" in text
    assert "The data differs" not in as_markdown(reproduction({}, "full"))
    paths = write_reproduction(found, tmp_path / "report")
    assert {path.name for path in paths} == {"report.md", "report.json", "report.png"}
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == json.loads(json.dumps(as_data(found)))
    nothing = write_reproduction(reproduction({}), tmp_path / "none")
    assert {path.name for path in nothing} == {"report.md", "report.json"}


def test_a_row_names_the_data_set_that_it_was_trained_on() -> None:
    """A difference to the paper is formed on the paper's data set alone."""
    means = {"SG ResNet10, BSG": 90.0, "literal: SG ResNet18, BSG": 95.0}
    small, full = reproduction(means), reproduction(means, "full")
    papers = [row.entry.full_name for row in small.rows]
    assert [row.name for row in full.rows] == papers
    assert [row.name for row in small.rows] == [f"digits: {row.entry.row.name}" for row in small.rows]
    for found, data, difference in ((small, "digits", None), (full, "CIFAR-100", 20.38)):
        measured = [row for row in as_data(found)["rows"] if row["metrics"]["test/top1"]["mean"] is not None]
        assert len(measured) == 2
        assert {row["metrics"]["test/top1"]["data"] for row in measured} == {data}
        assert {row["paper"]["data"] for row in measured} == {"CIFAR-100"}  # also in the group of gradients
        assert all("figures" not in row and "paper" not in row["metrics"]["test/top1"] for row in measured)
        found_difference = measured[1]["metrics"]["test/top1"]["difference"]
        assert found_difference == (None if difference is None else pytest.approx(difference))
        assert ("| difference |" in as_markdown(found)) is (difference is not None)
        panels = _panels(found)
        mixed = [name for name, rows in panels.items() if any(p is not None and m is not None for _, p, m, _ in rows)]
        assert mixed == (["top-1, %"] if found is full else [])
    assert list(_panels(small)) == ["top-1, %, on digits", "the paper's top-1, %, on CIFAR-100"]


def test_the_data_set_of_a_row_is_that_of_its_runs(tmp_path: Path) -> None:
    """Not that of its recipe: at full scale, too, other data are another quantity."""
    table = load_table("sg_resnet_table3")
    entry = next(table.entries("CIFAR-100: SG ResNet10"))
    plan = ReproductionPlan(table, "full", seeds=1)
    config = config_of("cifar100_sg_resnet18", plan.point(entry, 0))
    options = Options(tmp_path)
    for name, row_name, difference in (
        ("cifar100", "CIFAR-100: SG ResNet10", pytest.approx(-13.19)),
        ("flowers", "flowers: SG ResNet10", None),
    ):
        run = Run(options.trials_dir("search") / "t-0")
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / "config.json").write_text(json.dumps(config.dump()))
        DataSummary("cifar100", "d" * 64, ("a", "b"), (), (3, 32, 32), name).write(run.path)
        record = TrialRecord(0, "t-0", plan.point(entry, 0), {}, {"test/top1": 0.6}, "finished", 1.0, 0)
        search = search_of(
            {
                "recipe": "cifar100_sg_resnet18",
                "sampler": "listed",
                "points": [record.overrides],
                "objectives": {"val/top1": "max"},
            }
        )
        result = SearchResult("search", tmp_path, search, (record,), 1.0, True)
        row = measured_row(plan, entry, *trainings_of(result, options, {config.digest()}))
        assert (row.name, row.cells["test/top1"].difference) == (row_name, difference)
        (run.path / "config.json").unlink()  # a run that is not asked for need not be there
        assert trainings_of(result, options, {}) == ({}, {})


@pytest.mark.parametrize("name", list_tables())
def test_groups_are_on_the_papers_data_sets(name: str) -> None:
    """A group of another name says which."""
    sets = {"CIFAR-10", "CIFAR-100", "ImageNet", "DVS-CIFAR10", "COCO", "Gen1"}
    assert {group.paper_data for group in load_table(name).groups} <= sets


def test_what_is_counted_on_the_full_network_is_compared_at_every_scale() -> None:
    table = load_table("sg_resnet_table5")
    entry = next(table.entries("CIFAR-100: SG ResNet18"))
    cells = cells_of(table, entry, [], same_data=False)
    row = ReproducedRow(entry, cells, data="digits", same_data=False)
    report = as_data(Reproduction(ReproductionPlan(table, "digits"), (row,)))["rows"][0]
    assert report["metrics"]["parameters"]["data"] == "CIFAR-100"
    assert report["metrics"]["parameters"]["difference"] == pytest.approx(0.003, abs=1e-3)
    assert report["metrics"]["acs"]["data"] == "digits"
    assert "parameters, M (full network)" in as_markdown(Reproduction(ReproductionPlan(table, "digits"), (row,)))


def test_a_cell_compares_only_what_is_there() -> None:
    assert Cell(70.0, (71.0,)).difference == 1.0
    assert Cell(70.0, (71.0,)).deviation is None
    assert Cell(70.0).difference is None
    assert Cell(70.0, (71.0,), same_data=False).difference is None
    assert Cell(None, (71.0, 73.0)).deviation == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"columns": {}}, "is not a column of the table"),
        (
            {"columns": {"test/top1": {"label": "a", "unit": "b", "from": "card"}}},
            "'counted' is missing",
        ),
        ({"counted": {"side": 32, "constants": "int8", "shortcuts": True}}, "unknown energy constants"),
    ],
)
def test_a_table_that_does_not_hang_together_is_refused(change: dict[str, object], part: str) -> None:
    tree = load_table("sg_resnet_table9").model_dump(by_alias=True)
    with pytest.raises(ValueError, match=part):
        PaperTable.model_validate({**tree, **change})


def test_a_row_must_say_why_it_cannot_run() -> None:
    tree = load_table("sg_resnet_table9").model_dump(by_alias=True)
    tree["groups"][0]["scales"].pop("fashion_mnist")
    with pytest.raises(ValueError, match="does not say why it cannot run at scale fashion_mnist"):
        PaperTable.model_validate(tree)


def test_a_recipe_that_is_edited_is_read_anew(tmp_path: Path) -> None:
    """What a row learns is asked for with each training; a recipe of one's own may change in between."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: digits\noptim: {lr: 0.1}\n")
    before = config_of(str(recipe), {"train.epochs": 2})
    recipe.write_text("base: digits\noptim: {lr: 0.2}\n")
    after = config_of(str(recipe), {"train.epochs": 2})
    assert (before.optim.lr, after.optim.lr) == (0.1, 0.2)
    assert before.digest() != after.digest()


@pytest.mark.parametrize(
    ("options", "differs"),
    [({"upsample": 2}, False), ({}, True), ({"upsample": 1}, True)],
)
def test_a_training_on_other_data_is_of_an_earlier_form(options: dict[str, int], differs: bool, tmp_path: Path) -> None:
    """Also the same images in another size."""
    run = Run(tmp_path / "trial")
    run.path.mkdir()
    trained = config_of("digits_narrow", {"data.options": options})
    (run.path / "config.json").write_text(json.dumps(trained.dump()))
    run.note(status="finished", validation={}, test={})
    assert trained_otherwise(run, config_of("digits_narrow", {})) is differs


def test_rows_without_test_images_have_their_metrics_of_val() -> None:
    """As on COCO and ImageNet; trainings of earlier versions, which called them test, keep their numbers."""
    table = load_table("spike_yolo_table1")
    entry = next(entry for entry in table.entries() if "test/map50_95" in entry.row.paper)

    def trained(**metrics: float) -> list[Training]:
        named = {key.replace("_", "/", 1): value for key, value in metrics.items()}
        return [Training(config_of("digits", {}), {}, named, 1.0, "digits", "d" * 64, "abc", "t-0")]

    on_val = trained(val_map50=0.5, val_map50_95=0.3)
    earlier = trained(val_map50=0.5, val_map50_95=0.3, test_map50=0.4, test_map50_95=0.2)
    for runs, split, expected in ((on_val, "val", 30.0), (earlier, "test", 20.0), ([], "", None)):
        keys = [key for key, column in table.columns.items() if column.origin == "run"]
        cells = cells_of(table.model_copy(update={"columns": {key: table.columns[key] for key in keys}}), entry, runs)
        assert cells["test/map50_95"].mean == (None if expected is None else pytest.approx(expected))
        assert split_of(table, runs) == split
    found = reproduction({"SG ResNet10, BSG": 90.0})
    rows = tuple(replace(row, split="val") if row.trials else row for row in found.rows)
    assert "* Measured on val, on which the checkpoint was chosen too" in as_markdown(replace(found, rows=rows))
