"""The words on MLflow's pages about runs, searches and versions."""

from __future__ import annotations

import json

from spikefleet.config.recipes import load_config
from spikefleet.data_summary import DataSummary
from spikefleet.registry.model_card import MOST_CHARACTERS
from spikefleet.registry.version_page import with_promotion
from spikefleet.runs.run_page import (
    Results,
    dataset_of,
    registration_sentence,
    run_description,
    shown_params,
    source_tags,
    training_experiment,
)
from spikefleet.search.search_page import search_description, search_experiment, trial_description
from spikefleet_models.families import model_config
from spikefleet_tune.journal import TrialRecord
from spikefleet_tune.ledger import TrialStart
from spikefleet_tune.search_file import Search

DATA = DataSummary("digits", "f438ba1aaf09" + "0" * 52, tuple(map(str, range(10))), (), (1, 8, 8))
CARD = "# net\n\n## Use\n\n* Task: classification.\n\n## Limits\n\n* none.\n"


def test_t_and_d_have_short_names() -> None:
    assert shown_params(model_config("sg_resnet_tiny", timesteps=4)) == {"T": 4, "D": 1}
    yolo = load_config("scenes_spike_yolo", {"model.timesteps": 2, "model.neuron.bound": 3}).model
    assert shown_params(yolo) == {"T": 2, "D": 3}
    assert shown_params(model_config("sg_resnet_tiny", connection="ann")) == {"T": 1}


def test_a_commit_is_the_version_of_the_source_and_a_release_is_not() -> None:
    plain = {"mlflow.source.name": "spikefleet train digits", "mlflow.source.type": "LOCAL"}
    assert source_tags("spikefleet train digits", "spikefleet-0.1.0") == plain
    for code in ("642b722e01f9", "642b722e01f9+dirty"):
        found = source_tags("spikefleet train digits", code)
        assert found == {**plain, "mlflow.source.git.commit": "642b722e01f9"}


def test_the_first_line_of_a_description_does_not_change() -> None:
    config = load_config("digits", {})
    before = run_description(config, DATA)
    results = Results({"val/top1": 0.975, "test/top1": 0.96, "test/top5": 1.0}, 3, 0.002652, "proved")
    registered = registration_sentence("net", 3, "champion", "val/top1 <b> is [better](x)")
    after = run_description(config, DATA, results, registered)
    assert before.partition("\n")[0] == after.partition("\n")[0]
    assert before.partition("\n")[0] == "Training of recipe digits on data set digits, T = 4, D = 1."
    assert "**val/top1 97.50%, test/top1 96.00%, 0.002652 mJ for an image**" in after
    assert "| top5 | - | 100.00% |" in after
    assert "of epoch 3, the best on val; spike-driven inference is proved" in after
    assert (
        "(#/models/net/versions/3?workflowType=machine_learning) became champion: val/top1 &lt;b> is \\[better]"
        in after
    )
    assert "epoch 3" not in before
    without_val = run_description(config, DATA, Results({"test/top1": 0.5}, None, 1.0, "not shown"))
    assert "**test/top1 50.00%, 1 mJ for an image**" in without_val
    assert "of the last epoch" in without_val
    assert registration_sentence("net", 3, None, "chance").endswith("got no alias: chance.")


def test_the_data_set_names_content_and_sizes() -> None:
    found = dataset_of(DATA, "stores/digits", {"train": 3, "val": 1})
    assert (found.name, found.digest) == ("digits", "f438ba1aaf09")
    assert json.loads(found.profile) == {
        "num_rows": 4,
        "train": 3,
        "val": 1,
        "classes": 10,
        "content_hash": DATA.content_hash,
    }
    assert "[-1, 1, 8, 8]" in found.schema
    assert "[-1, -1, -1, -1]" in dataset_of(DataSummary("coco", "0" * 64, ()), "s3://bucket/coco").schema


def test_the_columns_of_a_detector_are_its_own_metric() -> None:
    config = load_config("scenes_spike_yolo", {})
    (state,) = (json.loads(text) for key, text in training_experiment(config).items() if "sharedView" in key)
    assert f"metrics.`test/{config.checkpoint.metric}`" in state["state"]
    assert "top1" not in state["state"]
    assert json.loads(state["state"])["searchFilter"] == "tags.recipe = 'scenes_spike_yolo'"


def test_a_search_is_told_in_words() -> None:
    plain = {"space": {"optim.lr": {"choice": [0.1, 0.2]}}, "objectives": {"loss": "min"}, "budget": {"trials": 2}}
    search = Search.model_validate({"recipe": "digits", **plain})
    (state,) = (json.loads(text) for key, text in search_experiment("small", search).items() if "sharedView" in key)
    view = json.loads(state["state"])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`loss`", True)
    assert view["searchFilter"] == "tags.search = 'small'"
    assert search_description("small", search).startswith("Search small over recipe digits.\n")
    start = trial_description("small", TrialStart(4, "small-0004", {}, {"optim.lr": 0.1}, 1))
    record = TrialRecord(
        4, "small-0004", {}, {"optim.lr": 0.1}, {"loss": 0.25, "parameters": 7.0}, "pruned", 1.0, 0, "nan"
    )
    end = trial_description("small", record)
    assert start.partition("\n")[0] == end.partition("\n")[0] == "Trial 4 of search small."
    assert "* Status: pruned, nan." in end
    assert "| parameters | 7 |" in end
    assert "| optim.lr | 0.1 |" in start


def test_a_champion_says_since_when_and_why() -> None:
    tags = {
        "promoted_by": "retraining r1",
        "promoted_at": "2026-11-27T02:22:40+00:00",
        "promoted_because": "better by <i>McNemar</i>",
        "previous_champion": "2",
    }
    told = with_promotion(CARD, "net", tags)
    assert told.startswith(
        "# net\n\n**Became champion** on 2026-11-27 02:22:40 UTC by retraining r1, in place of [net version 2]("
    )
    assert "better by &lt;i>McNemar&lt;/i>.\n\n## Use\n" in told
    assert with_promotion(told, "net", tags) == told
    assert with_promotion(told, "net", {}) == CARD
    assert with_promotion(CARD, "net", {}) == CARD
    assert "**Rolled back**, and no more champion: reads 7 as 1." in with_promotion(
        told, "net", {**tags, "rolled_back": "reads 7 as 1"}
    )
    assert "in place of" not in with_promotion(CARD, "net", {**tags, "previous_champion": "../2"})


def test_a_long_card_stays_within_what_mlflow_keeps() -> None:
    long = CARD + "\n".join(f"* line {number}" for number in range(1000))
    told = with_promotion(long, "net", {"promoted_because": "x" * 3000})
    assert len(told) <= MOST_CHARACTERS
    assert told.rstrip().endswith("`spikefleet registry show --card`")
