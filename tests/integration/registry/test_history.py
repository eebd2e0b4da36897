"""The history of aliases: append-only, hash-chained, and complete also after kills and changes by hand; rollback."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from spikefleet.errors import UserError
from spikefleet.registry import aliases as alias_changes
from spikefleet.registry.api import keep_as_challenger, promote, read_history, rollback, show
from spikefleet.registry.history import HEAD, RUN, History
from support.registered import Trained


@pytest.fixture
def client(first: Trained) -> MlflowClient:
    return MlflowClient(first.uri, registry_uri=first.uri)


def versions(first: Trained, folder: Path, name: str, values: list[float]) -> None:
    for seed, value in enumerate(values, start=90):
        first.again(seed, folder).register(name, value)


def summary(history: History) -> list[tuple[str, str, int | None, int | None]]:
    return [(change.action, change.alias, change.before, change.after) for change in history.changes]


def entry_file(client: MlflowClient, name: str, number: int) -> Path:
    """The stored file of an entry."""
    run = client.get_run(client.get_registered_model(name).tags[RUN])
    return Path(run.info.artifact_uri.removeprefix("file://")) / "history" / f"{number:06}.json"


def test_every_change_is_recorded_with_its_reason(first: Trained, client: MlflowClient, tmp_path: Path) -> None:
    versions(first, tmp_path, "told", [0.8, 0.9, 0.7])
    for number in (1, 2, 3):
        promote("told", number, "top1", tracking_uri=first.uri)
    keep_as_challenger("told", 1, "by hand", retraining="told-1", tracking_uri=first.uri)
    history = read_history("told", tracking_uri=first.uri)
    assert history.damage is None
    assert summary(history) == [
        ("promoted", "champion", None, 1),
        ("promoted", "champion", 1, 2),
        ("kept as challenger", "challenger", None, 3),
        ("kept as challenger", "challenger", 3, 1),
    ]
    assert [change.number for change in history.changes] == [1, 2, 3, 4]
    assert history.changes[1].why == "top1 0.9 of version 2 is better than 0.8 of champion version 1 (max)"
    assert [change.retraining for change in history.changes] == [None, None, None, "told-1"]
    champion = show("told", tracking_uri=first.uri).champion
    assert champion is not None
    assert champion.tags["promoted_because"] == history.changes[1].why
    assert champion.tags["previous_champion"] == "1"
    promote("told", 2, "top1", tracking_uri=first.uri)  # nothing changes, so nothing is recorded
    assert len(read_history("told", tracking_uri=first.uri).changes) == 4


def test_what_was_moved_by_hand_or_by_a_killed_job_is_recorded_by_the_next_one(
    first: Trained, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(first, tmp_path, "moved", [0.8, 0.9, 0.95])
    promote("moved", 1, "top1", tracking_uri=first.uri)

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(alias_changes, "append_change", kill)
        with pytest.raises(KeyboardInterrupt):
            promote("moved", 2, "top1", tracking_uri=first.uri)
    assert len(read_history("moved", tracking_uri=first.uri).changes) == 1
    promote("moved", 3, "top1", tracking_uri=first.uri)
    client.set_registered_model_alias("moved", "champion", "1")
    keep_as_challenger("moved", 2, "x", tracking_uri=first.uri)
    assert summary(read_history("moved", tracking_uri=first.uri)) == [
        ("promoted", "champion", None, 1),
        ("found", "champion", 1, 2),
        ("promoted", "champion", 2, 3),
        ("found", "champion", 3, 1),
        ("kept as challenger", "challenger", None, 2),
    ]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("edit", r"000003\.json does not continue the entry before it"),
        ("remove", r"000002\.json is missing"),
        ("cut off", r"000003\.json is missing"),
        ("replace the last", r"000003\.json is not the entry that the model's tag"),
        ("garbage", r"000002\.json is no entry"),
    ],
)
def test_a_history_that_was_tampered_with_is_noticed_and_nothing_follows_it(
    first: Trained, client: MlflowClient, tmp_path: Path, harm: str, says: str
) -> None:
    name = f"harm-{harm.replace(' ', '-')}"
    versions(first, tmp_path, name, [0.7, 0.8, 0.9])
    for number in (1, 2, 3):
        promote(name, number, "top1", tracking_uri=first.uri)
    files = [entry_file(client, name, number) for number in (1, 2, 3)]
    match harm:
        case "edit":
            plain = json.loads(files[1].read_text()) | {"why": "because I say so"}
            files[1].write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
        case "remove":
            files[1].unlink()
        case "cut off":
            files[2].unlink()
        case "replace the last":
            plain = json.loads(files[2].read_text()) | {"why": "because I say so"}
            files[2].write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
        case "garbage":
            files[1].write_text("{")
    history = read_history(name, tracking_uri=first.uri)
    damage = history.damage or ""
    assert re.match(says, damage), damage
    with pytest.raises(UserError, match=r"the history of model .* is damaged: .* restore its artifacts"):
        keep_as_challenger(name, 1, "x", tracking_uri=first.uri)
    assert show(name, tracking_uri=first.uri).pick(3).aliases == ("champion",)


def test_no_alias_moves_that_a_damaged_history_cannot_record(
    first: Trained, client: MlflowClient, tmp_path: Path
) -> None:
    """What is left of the history agrees with the aliases, so only its damage can stop the change."""
    versions(first, tmp_path, "stopped", [0.7, 0.8])
    for number in (1, 2):
        promote("stopped", number, "top1", tracking_uri=first.uri)
    rollback("stopped", "x", tracking_uri=first.uri)
    entry_file(client, "stopped", 2).write_text("{")
    assert read_history("stopped", tracking_uri=first.uri).aliases() == {"champion": 1}
    with pytest.raises(UserError, match="the history of model stopped is damaged"):
        keep_as_challenger("stopped", 2, "x", tracking_uri=first.uri)
    assert show("stopped", tracking_uri=first.uri).pick(2).aliases == ()


def test_a_head_that_was_removed_or_set_back_is_noticed(first: Trained, client: MlflowClient, tmp_path: Path) -> None:
    versions(first, tmp_path, "headless", [0.7, 0.8, 0.9])
    heads = []
    for number in (1, 2, 3):
        promote("headless", number, "top1", tracking_uri=first.uri)
        heads.append(client.get_registered_model("headless").tags[HEAD])
    client.set_registered_model_tag("headless", HEAD, heads[1])  # as a job leaves it that is killed before the tag
    assert read_history("headless", tracking_uri=first.uri).damage is None
    client.set_registered_model_tag("headless", HEAD, heads[0])
    damage = read_history("headless", tracking_uri=first.uri).damage or ""
    assert re.match(r"000003\.json is there, but the model's tag .* names entry 1", damage), damage
    client.delete_registered_model_tag("headless", HEAD)
    damage = read_history("headless", tracking_uri=first.uri).damage or ""
    assert re.match(r"000002\.json is there, but the model's tag .* names none", damage), damage


def test_another_reason_to_keep_a_challenger_is_recorded_once(first: Trained, tmp_path: Path) -> None:
    versions(first, tmp_path, "kept", [0.9, 0.8])
    promote("kept", 1, "top1", tracking_uri=first.uri)
    for why in ("it is compared later", "version 2 is not better", "version 2 is not better"):
        keep_as_challenger("kept", 2, why, tracking_uri=first.uri)
    changes = read_history("kept", tracking_uri=first.uri).changes
    assert [(change.before, change.after, change.why) for change in changes if change.alias == "challenger"] == [
        (None, 2, "it is compared later"),
        (2, 2, "version 2 is not better"),
    ]


def test_an_entry_cut_short_by_a_kill_is_written_again(first: Trained, client: MlflowClient, tmp_path: Path) -> None:
    versions(first, tmp_path, "short", [0.7, 0.8])
    promote("short", 1, "top1", tracking_uri=first.uri)
    entry_file(client, "short", 2).write_text('{"number": 2, "wh')
    assert read_history("short", tracking_uri=first.uri).damage is None
    promote("short", 2, "top1", tracking_uri=first.uri)
    assert summary(read_history("short", tracking_uri=first.uri))[-1] == ("promoted", "champion", 1, 2)
    assert client.get_registered_model("short").tags[HEAD].startswith("2 ")


def test_rollback_restores_the_champion_before_and_bars_the_other(first: Trained, tmp_path: Path) -> None:
    versions(first, tmp_path, "back", [0.7, 0.8, 0.9])
    promote("back", 1, "top1", tracking_uri=first.uri)
    with pytest.raises(UserError, match="replaced no champion that is known; name the version with --to"):
        rollback("back", "x", tracking_uri=first.uri)
    promote("back", 2, "top1", tracking_uri=first.uri)
    with pytest.raises(UserError, match="the reason of a rollback is empty"):
        rollback("back", "  ", tracking_uri=first.uri)
    with pytest.raises(UserError, match="version 2 of model back is the champion already"):
        rollback("back", "x", 2, tracking_uri=first.uri)
    with pytest.raises(UserError, match="no version 9"):
        rollback("back", "x", 9, tracking_uri=first.uri)
    outcome = rollback("back", "reads 7 as 1", tracking_uri=first.uri)
    assert (outcome.version, outcome.champion, outcome.alias) == (1, 1, "champion")
    model = show("back", tracking_uri=first.uri)
    assert model.pick(2).tags["rolled_back"] == "reads 7 as 1"
    again = promote("back", 2, "top1", tracking_uri=first.uri)
    assert again.alias == "challenger"
    assert again.reason.startswith("version 2 was rolled back: reads 7 as 1;")
    assert promote("back", 3, "top1", tracking_uri=first.uri).champion == 3  # another one may become champion
    assert rollback("back", "it was right after all", 2, tracking_uri=first.uri).champion == 2
    rollback("back", "no, it was not", tracking_uri=first.uri)
    assert rollback("back", "nor was that", 3, tracking_uri=first.uri).champion == 3
    with pytest.raises(UserError, match=r"replaced version 1, which was rolled back itself: nor was that; name the"):
        rollback("back", "back again", tracking_uri=first.uri)
    assert rollback("back", "it was right after all", 2, tracking_uri=first.uri).champion == 2
    assert "rolled_back" not in show("back", tracking_uri=first.uri).pick(2).tags
    actions = [change.action for change in read_history("back", tracking_uri=first.uri).changes]
    assert actions[:5] == ["promoted", "promoted", "rolled back", "kept as challenger", "promoted"]
    assert actions.count("rolled back") == 5


def test_a_version_without_proof_or_with_changed_files_is_not_rolled_back_to(
    first: Trained, client: MlflowClient, tmp_path: Path
) -> None:
    versions(first, tmp_path, "sound", [0.7, 0.8])
    for number in (1, 2):
        promote("sound", number, "top1", tracking_uri=first.uri)
    place = Path(client.get_model_version_download_uri("sound", "1").removeprefix("file://"))
    weights = next(place.rglob("*.safetensors"))
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + b"\x00")
    with pytest.raises(
        UserError, match=r"^models:/sound/1: weights\.safetensors is not the registered file: .*; restore them"
    ):
        rollback("sound", "x", tracking_uri=first.uri)
    weights.write_bytes(kept)
    client.set_model_version_tag("sound", "1", "spike_driven", "refuted")
    with pytest.raises(UserError, match="sound/1 cannot become champion: the binary form"):
        rollback("sound", "x", tracking_uri=first.uri)
    champion = show("sound", tracking_uri=first.uri).champion
    assert champion is not None
    assert champion.version == 2
    assert "rolled_back" not in champion.tags


def test_the_alias_of_a_version_that_others_registered_is_not_taken_from_it(
    first: Trained, client: MlflowClient, tmp_path: Path
) -> None:
    versions(first, tmp_path, "foreign", [0.7])
    source = client.get_model_version_download_uri("foreign", "1")
    other = client.create_model_version("foreign", source)
    client.set_registered_model_alias("foreign", "champion", other.version)
    with pytest.raises(UserError, match=r"version 2 of model foreign has the alias champion, but spikefleet did not"):
        promote("foreign", 1, "top1", tracking_uri=first.uri)
    assert int(client.get_registered_model("foreign").aliases["champion"]) == 2
    client.delete_registered_model_alias("foreign", "champion")
    assert promote("foreign", 1, "top1", tracking_uri=first.uri).champion == 1
