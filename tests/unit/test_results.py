"""Recorded results of trainings: what is written is read back, and grows only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from spikefleet.config.schema import Config
from spikefleet.errors import UserError
from spikefleet.reproduction import results
from spikefleet.reproduction.plan import ReproductionPlan, config_of
from spikefleet.reproduction.reproduce import reproduce
from spikefleet.reproduction.results import Training, add_results, read_results, setting_of
from spikefleet.reproduction.rows import Reproduction
from spikefleet.reproduction.table import load_table
from spikefleet.reproduction.training_time import seconds_left
from spikefleet.runs.options import Options
from spikefleet_models.energy import EnergyCard, energy_at_rates
from spikefleet_models.families import build_model
from spikefleet_tune.lock import hold


@pytest.fixture(scope="module")
def card() -> EnergyCard:
    network = build_model(config_of("digits", {"model.width": 0.125, "model.stages": [1]}).model)
    return energy_at_rates(network, (8, 8), 0.1, "fp32-45nm")


@pytest.fixture(scope="module")
def trained(card: EnergyCard) -> dict[int, Training]:
    """Trainings of a row of table 9 with seeds 0 to 2."""
    table = load_table("sg_resnet_table9")
    plan, entry = ReproductionPlan(table, "digits"), next(table.entries("SG ResNet10, BSG"))
    found = {}
    for seed in range(3):
        point = plan.point(entry, seed)
        config = config_of("digits_narrow", point)
        metrics = {"test/top1": 0.9 + seed / 100, "val/top1": 0.91, "energy_mj": 1e-3}
        history = ({"epoch": 0.0, "val/top1": 0.9, "balance_coefficient": 1 / 3},)
        found[seed] = Training(
            config, point, metrics, 10.0 + seed, "digits", "d" * 64, "abc", f"t-{seed}", history, card
        )
    return found


def test_what_is_recorded_is_read_back(trained: dict[int, Training], tmp_path: Path) -> None:
    file = tmp_path / "results" / "one.parquet"
    assert read_results(file) == {}
    assert add_results(file, trained.values()) == 3
    found = read_results(file)
    assert set(found) == {training.digest for training in trained.values()}
    for training in trained.values():
        again = found[training.digest]
        assert replace(again, history=()) == replace(training, history=())
        assert again.history[0]["balance_coefficient"] == pytest.approx(1 / 3, abs=1e-6)
        assert again.setting == trained[0].setting
    assert file.stat().st_size < 30_000


def test_a_training_is_there_once_and_keeps_its_first_result(trained: dict[int, Training], tmp_path: Path) -> None:
    file = tmp_path / "one.parquet"
    add_results(file, [trained[0]])
    before = file.read_bytes()
    changed = replace(trained[0], metrics={"test/top1": 0.1}, trial="other")
    assert add_results(file, [changed]) == 0
    assert file.read_bytes() == before
    assert add_results(file, [changed, trained[1], trained[1], trained[2]]) == 2
    assert read_results(file)[trained[0].digest].metrics["test/top1"] == 0.9
    assert len(pq.read_table(file)) == 3


def test_the_same_trainings_are_the_same_file(trained: dict[int, Training], tmp_path: Path) -> None:
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    add_results(one, trained.values())
    for seed in (2, 0, 1):
        add_results(other, [trained[seed]])
    assert one.read_bytes() == other.read_bytes()


def test_a_file_that_is_no_record_is_refused(trained: dict[int, Training], tmp_path: Path) -> None:
    file = tmp_path / "one.parquet"
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"one.parquet is not a file of results .*restore it"):
        add_results(file, trained.values())
    assert file.read_bytes() == b"PAR1 not really"
    add_results(other := tmp_path / "other.parquet", trained.values())
    table = pq.read_table(other)
    pq.write_table(table.set_column(table.schema.get_field_index("config"), "config", [["{"] * 3]), other)
    with pytest.raises(UserError, match=r"other.parquet is not a file of results"):
        read_results(other)


def test_a_training_of_another_version_is_left_out_and_kept(
    trained: dict[int, Training], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_results(file := tmp_path / "one.parquet", [trained[0], trained[1]])
    table = pq.read_table(file)
    configs = table["config"].to_pylist()
    later = json.dumps({**json.loads(configs[0]), "unheard_of": 1})
    pq.write_table(table.set_column(table.schema.get_field_index("config"), "config", [[later, configs[1]]]), file)
    assert len(read_results(file)) == 1
    assert "1 training of another version left out: " in caplog.text
    assert "unheard_of" in caplog.text
    assert add_results(file, [trained[2]]) == 1
    assert later in pq.read_table(file)["config"].to_pylist()
    assert len(read_results(file)) == 2


def test_files_are_written_by_one_process_at_a_time(
    trained: dict[int, Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "_PATIENCE_S", 0.0)
    file = tmp_path / "one.parquet"
    with (
        hold(tmp_path / ".one.parquet.lock"),
        pytest.raises(UserError, match=r"one\.parquet is being written by process"),
    ):
        add_results(file, [trained[0]])
    assert add_results(file, [trained[0]]) == 1


def test_a_setting_is_a_training_but_for_its_seed(trained: dict[int, Training]) -> None:
    assert {training.setting for training in trained.values()} == {trained[0].setting}
    assert len({training.digest for training in trained.values()}) == 3
    other = config_of("digits_narrow", {**trained[0].overrides, "optim.lr": 0.05})
    assert setting_of(other) != trained[0].setting


def reproduced(results: Path, folder: Path, only: str = "SG ResNet10*") -> Reproduction:
    """Table 9 from recorded results, with two seeds."""
    plan = ReproductionPlan(load_table("sg_resnet_table9"), "digits", 2, only, train=False, results=results)
    return reproduce(plan, Options(folder / "runs", folder / "stores"), Console(quiet=True))


def test_a_table_is_read_from_recorded_results_alone(trained: dict[int, Training], tmp_path: Path) -> None:
    add_results(tmp_path / "results" / "paper-digits-digits_narrow.parquet", trained.values())
    bsg, star = reproduced(tmp_path / "results", tmp_path).rows
    assert bsg.cells["test/top1"].values == pytest.approx((90.0, 91.0))
    assert (bsg.seeds, bsg.trials, bsg.data_hashes, bsg.commits) == ((0, 1), ("t-0", "t-1"), ("d" * 64,), ("abc",))
    assert (bsg.name, bsg.split, bsg.remark) == ("digits: SG ResNet10, BSG", "test", "")
    assert star.remark == "not run: seed 0 was not run; seed 1 was not run"
    # A record of another scale or recipe, and one of a recipe that has changed, is none of this table.
    (tmp_path / "other").mkdir()
    add_results(tmp_path / "other" / "paper-full-digits_narrow.parquet", trained.values())
    assert all(not row.trials for row in reproduced(tmp_path / "other", tmp_path).rows)
    changed = [replace(one, config=_with_rate(one.config, 0.3)) for one in trained.values()]
    add_results(tmp_path / "changed" / "paper-digits-digits_narrow.parquet", changed)
    assert all(not row.trials for row in reproduced(tmp_path / "changed", tmp_path).rows)


def test_rows_of_several_versions_and_contents_say_so(trained: dict[int, Training], tmp_path: Path) -> None:
    later = replace(trained[1], code_version="def", data_hash="e" * 64)
    add_results(tmp_path / "results" / "paper-digits-digits_narrow.parquet", [trained[0], later])
    bsg, _ = reproduced(tmp_path / "results", tmp_path).rows
    assert bsg.remark == (
        "trainings of 2 versions of the code (abc, def); trainings on 2 contents of the data (dddddddddddd, "
        "eeeeeeeeeeee)"
    )
    add_results(tmp_path / "other" / "paper-digits-digits_narrow.parquet", [trained[0], trained[1]])
    stale = replace(trained[2], data_hash="e" * 64)
    add_results(tmp_path / "other" / "paper-digits-digits_narrow.parquet", [stale])
    assert "trained on other data (content dddddddddddd)" in reproduced(tmp_path / "other", tmp_path).rows[0].remark


def _with_rate(config: Config, rate: float) -> Config:
    return Config.model_validate({**(tree := config.dump()), "optim": {**tree["optim"], "lr": rate}})


def test_a_record_without_a_card_has_no_energy_and_is_named(trained: dict[int, Training], tmp_path: Path) -> None:
    table = load_table("sg_resnet_table5")
    entry = next(table.entries("CIFAR-100: SG ResNet18"))
    config = config_of(entry.group.scales["digits"].recipe, ReproductionPlan(table, "digits").point(entry, 0))
    bare = replace(trained[0], config=config, card=None)
    file = tmp_path / f"paper-digits-{entry.group.scales['digits'].recipe}.parquet"
    add_results(file, [bare])
    plan = ReproductionPlan(table, "digits", 1, "CIFAR-100: SG ResNet18", train=False, results=tmp_path)
    (row,) = reproduce(plan, Options(tmp_path), Console(quiet=True)).rows
    counted = [key for key, column in table.columns.items() if column.origin == "card"]
    assert counted
    assert all(row.cells[key].values == () for key in counted)
    assert "1 training without an energy card" in row.remark


def test_the_time_left_is_that_of_the_same_setting(trained: dict[int, Training]) -> None:
    done = [trained[0], trained[2]]  # 10 and 12 s
    other = replace(trained[1], config=_with_rate(trained[1].config, 0.3), seconds=31.0)
    assert seconds_left([], [trained[0].setting]) is None
    assert seconds_left(done, [trained[0].setting] * 3) == pytest.approx(33.0)
    assert seconds_left([*done, other], [trained[0].setting, other.setting]) == pytest.approx(11.0 + 31.0)
    assert seconds_left([*done, other], ["unknown"]) == pytest.approx(53 / 3)
    assert seconds_left(done, []) == 0


def test_json_columns_are_plain(trained: dict[int, Training], tmp_path: Path) -> None:
    """Readable without this package."""
    add_results(file := tmp_path / "one.parquet", [trained[0]])
    (row,) = pq.read_table(file).to_pylist()
    assert json.loads(row["overrides"])["model.connection"] == "bsg"
    assert dict(row["metrics"])["test/top1"] == 0.9
    assert row["digest"] == trained[0].digest
    assert "rows" not in json.loads(row["energy_card"])
