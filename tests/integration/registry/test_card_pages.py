"""The card of a version: on the command line, and as the descriptions that MLflow's pages show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlflow
import pytest
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.registry.api import card_text, promote, pull
from spikefleet.registry.version_page import describe_champion
from support.registered import Trained


@pytest.fixture
def client(first: Trained) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(first.uri, registry_uri=first.uri)


def test_the_description_of_version_and_model_is_the_card(first: Trained, client: mlflow.MlflowClient) -> None:
    version = first.register("carded")
    shown = client.get_model_version("carded", "1").description
    assert shown.startswith("# carded\n")
    assert shown.partition("\n")[2] == card_text(version.uri, tracking_uri=first.uri).partition("\n")[2]
    assert client.get_registered_model("carded").description == shown
    assert "| top1 | test | 89.00% |" in shown


def test_a_new_champion_is_described_and_what_a_person_wrote_stays(
    first: Trained, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    for number, value in enumerate((0.5, 0.6, 0.7), 1):
        trained = first.again(number, tmp_path)
        trained.register("described", value)
        if number == 3:
            client.update_registered_model("described", description="Ask Ada before you deploy it.")
        assert promote("described", number, "val/top1", tracking_uri=first.uri).champion == number
        text = client.get_registered_model("described").description
        assert (text == "Ask Ada before you deploy it.") == (number == 3)
        if number < 3:
            assert text == client.get_model_version("described", str(number)).description


def test_a_champion_says_why_on_its_page_and_on_that_of_its_model(
    first: Trained, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    for number in (1, 2):
        first.again(number, tmp_path).register("explained", 0.5 + number / 10)
    card = client.get_model_version("explained", "2").description
    describe_champion(client, "explained", 1)
    client.set_model_version_tag("explained", "1", "rolled_back", "reads 7 as 1")
    client.set_model_version_tag("explained", "2", "promoted_because", "better by 2 points")
    client.set_model_version_tag("explained", "2", "previous_champion", "1")
    describe_champion(client, "explained", 2, before=1)
    shown = client.get_model_version("explained", "2").description
    assert shown != card
    assert "**Became champion**, in place of [explained version 1](" in shown
    assert "better by 2 points." in shown
    assert client.get_registered_model("explained").description == shown
    assert (
        "**Rolled back**, and no more champion: reads 7 as 1." in client.get_model_version("explained", "1").description
    )
    client.update_model_version("explained", "1", description="Ada knows")
    describe_champion(client, "explained", 1, before=2)
    assert client.get_model_version("explained", "1").description == "Ada knows"
    assert client.get_model_version("explained", "2").description == shown


def test_show_card_prints_it(first: Trained, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    version = first.register("card_shown")
    words = ["registry", "show", "card_shown/1", "--card", "--runs-dir", str(runs)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    text = card_text(version.uri, tracking_uri=first.uri)
    assert text in done.output
    plain = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert plain == {"uri": "models:/card_shown/1", "card": text}
    pulled = pull(version.uri, tmp_path / "card_shown", tracking_uri=first.uri)
    assert card_text(pulled).partition("\n")[2] == text.partition("\n")[2]
    missing = CliRunner().invoke(app, ["registry", "show", "card_shown", "--card", "--runs-dir", str(runs)])
    assert missing.exit_code != 0
    refused = missing.output + str(missing.exception)
    assert "no alias 'champion'; none of its versions has one; name the version, for example models:/card_shown/1" in (
        refused
    )


def test_the_card_says_what_is_wrong_with_a_version_and_why_it_is_champion(first: Trained, tmp_path: Path) -> None:
    flawed = first.again(60, tmp_path).register("card_flawed", 0.05)
    sentence = f"**Must not be used: {flawed.tags['flaw']}.**"
    assert sentence in card_text(flawed.uri, tracking_uri=first.uri)
    assert sentence in mlflow.MlflowClient(first.uri).get_model_version("card_flawed", "1").description
    assert sentence in card_text(pull(flawed.uri, tmp_path / "card_flawed", tracking_uri=first.uri))
    sound = first.again(61, tmp_path).register("card_flawed", 0.9)
    assert "It is the champion" not in card_text(sound.uri, tracking_uri=first.uri)
    outcome = promote("card_flawed", sound.version, "val/top1", tracking_uri=first.uri)
    text = card_text("models:/card_flawed@champion", tracking_uri=first.uri)
    assert re.search(r"\* It is the champion of card_flawed since 20\S+ \(promoted\): ", text)
    assert outcome.reason in text
    assert "Must not be used" not in text
