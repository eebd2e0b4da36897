"""The index of the registry proposes, the tags of the versions decide: random registries against brute force."""

from __future__ import annotations

import json
import operator
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.cli.output import console
from spikefleet.errors import UserError
from spikefleet.registry.api import RegisteredVersion, ranked, reindex
from spikefleet.registry.lookup_index import EXPERIMENT, INDEXED, VERSION, is_complete
from spikefleet.registry.mlflow_store import find_versions
from support.made_versions import ManyVersions, counted_statements, database_in, without_fsync

OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
NAMES = ["plain", "with.dots-and_more", "Model9", "like"]
WORDS = ["bsg", "add", "a+b:c", "1e5x", "nan", "it's", "x y", "and", "größe"]
NUMBERS = ["1", "2", "4", "007", "1e-3", "4.0", "-1"]
PROOFS = ["proved", "not spiking", "refuted", "not shown"]


@dataclass
class Asked:
    """A question, and what brute force makes of the facts."""

    terms: list[tuple[str, str, str, Any]]
    """Key, operator, how the value is written, the value."""
    metric: str
    mode: Literal["max", "min"]
    top: int
    dataset: str | None
    any_proof: bool
    product: int | None

    @property
    def where(self) -> str | None:
        parts = [f"{key} {op} {written}" for key, op, written, _ in self.terms]
        if self.product is not None:
            parts.append(f"(timesteps * bound <= {self.product} or connection == nothing)")
        return " and ".join(parts) or None

    def takes(self, version: RegisteredVersion) -> bool:
        tags = version.tags
        return (
            tags.get("task") == "classification"
            and (self.dataset is None or tags.get("dataset") == self.dataset)
            and "flaw" not in tags
            and (self.any_proof or tags.get("spike_driven") in ("proved", "not spiking"))
        )

    def holds(self, version: RegisteredVersion) -> bool:
        facts = facts_of(version)
        if self.product is not None:
            given = [as_number(facts.get(key)) for key in ("timesteps", "bound")]
            if None in given or not given[0] * given[1] <= self.product:
                return False
        return all(term_holds(facts, key, op, value) for key, op, _, value in self.terms)

    def answer(self, versions: list[RegisteredVersion]) -> list[RegisteredVersion]:
        def value(version: RegisteredVersion) -> float | None:
            return version.metrics.get(self.metric, version.metrics.get(f"val/{self.metric}"))

        sign = -1 if self.mode == "max" else 1
        kept = [v for v in versions if self.takes(v) and self.holds(v) and value(v) is not None]
        kept.sort(key=lambda v: (sign * value(v), "champion" not in v.aliases, v.created, v.name, v.version))
        return kept[: self.top]


def facts_of(version: RegisteredVersion) -> dict[str, Any]:
    short = {name[4:]: value for name, value in version.metrics.items() if name.startswith("val/")}
    facts = {**short, **version.metrics, **{k: v for k, v in version.tags.items() if not k.startswith("spikefleet.")}}
    parameters = as_number(version.tags.get("parameters"))
    return facts if parameters is None else {"params_m": parameters / 1e6, **facts}


def as_number(fact: Any) -> float | None:
    try:
        return None if fact in ("nan", None) else float(fact)
    except ValueError:
        return None


def term_holds(facts: Mapping[str, Any], key: str, op: str, value: Any) -> bool:
    if key not in facts:
        return False
    if isinstance(value, str):
        return OPERATORS[op](str(facts[key]), value)
    number = as_number(facts[key])
    return op == "!=" if number is None else OPERATORS[op](number, value)


def asked(dice: random.Random) -> Asked:
    terms = []
    for _ in range(dice.choice([0, 1, 1, 2, 3])):
        if dice.random() < 0.6:
            key = dice.choice(["timesteps", "energy_mj", "top1", "val/top1", "recipe", "mixed", "params_m", "a-b.c"])
            written = dice.choice(["2", "0.5", "1e-3", "-1", "40", "7", "0.308074"])
            terms.append((key, dice.choice(list(OPERATORS)), written, float(written)))
        else:
            key, word = dice.choice(["connection", "recipe", "mixed", "timesteps"]), dice.choice([*WORDS, "2"])
            written = f'"{word}"'
            terms.append((key, dice.choice(["==", "==", "!="]), written, word))
    return Asked(
        terms,
        metric=dice.choice(["top1", "top1", "val/top1", "test/top1", "energy_mj"]),
        mode=dice.choice(["max", "min"]),
        top=dice.choice([1, 3, 50]),
        dataset=dice.choice([None, "digits", "it's x"]),
        any_proof=dice.random() < 0.5,
        product=dice.choice([None, None, 8]),
    )


def random_version(dice: random.Random) -> tuple[dict[str, str], dict[str, float]]:
    """Tags and metrics; values are few, so that there are ties."""
    tags = {
        "dataset": dice.choice(["digits", "digits", "it's x"]),
        "spike_driven": dice.choice(PROOFS[:2] * 2 + PROOFS),
        "timesteps": dice.choice([*NUMBERS, "many"]),
        "bound": dice.choice(["1", "4"]),
        "connection": dice.choice(WORDS),
        "recipe": dice.choice([*WORDS, *NUMBERS]),
        "mixed": dice.choice([*WORDS, *NUMBERS]),  # a tag that registration does not set
    }
    metrics = {"val/top1": dice.choice([0.1, 0.5, 0.9, 0.95]), "energy_mj": dice.choice([0.001, 2.0, 39.9, 60.0])}
    metrics |= {"test/top1": dice.random(), "a-b.c": dice.choice([-1.0, 1e-3, 7.0])}
    if dice.random() < 0.1:
        metrics["top1"] = dice.random()  # a metric of its own beside the validation metric
    if dice.random() < 0.1:
        tags["flaw"] = "it finds nothing"
    for key in dice.sample(["timesteps", "mixed", "connection", "recipe"], dice.choice([0, 0, 1, 2])):
        del tags[key]
    if dice.random() < 0.1:
        del metrics["val/top1"]
    return tags, metrics


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    with without_fsync():
        yield


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without versions, whose schema takes seconds."""
    directory = tmp_path_factory.mktemp("empty")
    ManyVersions(database_in(directory))
    return directory


@pytest.fixture
def many(empty: Path, tmp_path: Path) -> ManyVersions:
    shutil.copytree(empty, tmp_path, dirs_exist_ok=True)
    return ManyVersions(database_in(tmp_path))


def filled(many: ManyVersions, dice: random.Random, count: int) -> list[tuple[str, int]]:
    places = [many.add(dice.choice(NAMES), *random_version(dice)) for _ in range(count)]
    for name, number in dice.sample(places, 3):
        many.client.set_registered_model_alias(name, "champion", str(number))
    for place in dice.sample(places, 3):
        many.client.delete_model_version(place[0], str(place[1]))
        places.remove(place)
    return places


def answer_of(many: ManyVersions, question: Asked, reasons: list[str] | None = None) -> list[RegisteredVersion]:
    try:
        return ranked(
            "classification",
            question.metric,
            question.dataset,
            question.where,
            question.mode,
            top=question.top,
            any_proof=question.any_proof,
            tracking_uri=many.uri,
            announce=None if reasons is None else reasons.append,
        )
    except UserError:
        return []


def compare(many: ManyVersions, dice: random.Random, questions: int) -> list[str]:
    """Asks questions and compares the answers with brute force; returns why all versions were read, each time."""
    reasons: list[str] = []
    versions = find_versions(many.client)
    answered = 0
    for _ in range(questions):
        question = asked(dice)
        expected = question.answer(versions)
        found = answer_of(many, question, reasons)
        assert [v.uri for v in found] == [v.uri for v in expected], question
        assert found == expected
        answered += bool(found)
    assert answered, "each seed has a question with an answer"
    return reasons


# Other seeds try other registries; they are many, for each question takes a tenth of a second.
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_the_answer_is_that_of_brute_force(many: ManyVersions, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spikefleet.registry.index_search._MARGIN", 0)  # so that answers take several pages
    dice = random.Random(seed)
    places = filled(many, dice, 24)
    reasons = compare(many, dice, 30)
    assert not [reason for reason in reasons if "index" not in reason or "edited" in reason]
    assert len(reasons) < 20, "most answers come from the index"

    for place in dice.sample(places, 3):  # somebody edits by hand what makes a version worse, or drops a key
        many.edit(place, *dice.choice([("metric.val/top1", "0.01"), ("recipe", None), ("flaw", "seen by a person")]))
    versions = find_versions(many.client)
    for top in (1, 4, 9):
        question = Asked([], "top1", "max", top, dice.choice([None, "digits"]), True, dice.choice([None, 8]))
        assert answer_of(many, question) == question.answer(versions)

    for place in dice.sample(places, 4):  # and anything, after which reindex is called
        many.edit(place, *dice.choice([("metric.val/top1", "0.97"), ("connection", "bsg"), ("timesteps", "1e-3")]))
    done = reindex(tracking_uri=many.uri)
    assert (done.versions, done.failed) == (len(places), ())
    assert 1 <= done.indexed <= 7
    assert reindex(tracking_uri=many.uri).indexed == 0
    assert not [reason for reason in compare(many, dice, 12) if "edited" in reason]


def add_usual(many: ManyVersions, top1: float, name: str = "plain", indexed: bool = True, **tags: str) -> Any:
    return many.add(name, {"timesteps": "2", "connection": "bsg", **tags}, {"val/top1": top1}, indexed=indexed)


def best_of(many: ManyVersions, where: str | None = None, top: int = 1) -> tuple[list[tuple[str, int]], list[str]]:
    """Name and number of the best versions, and why all versions were read."""
    said: list[str] = []
    found = ranked("classification", "top1", None, where, top=top, tracking_uri=many.uri, announce=said.append)
    return [(version.name, version.version) for version in found], said


def test_an_edited_version_that_the_index_proposes_is_noticed_and_others_by_reindex(many: ManyVersions) -> None:
    places = [add_usual(many, value / 100, timesteps=str(value % 3)) for value in range(40)]
    assert best_of(many) == ([places[39]], [])
    many.edit(places[39], "metric.val/top1", "0.385")
    found, (said,) = best_of(many)
    assert found == [places[39]]
    assert said == (
        "reading all versions: models:/plain/40 was edited by hand; `spikefleet registry reindex` makes lookups fast"
    )
    many.edit(places[0], "metric.val/top1", "0.99")  # the index does not know, so nothing of it can be noticed ...
    assert reindex(tracking_uri=many.uri).indexed == 2
    assert best_of(many) == ([places[0]], [])
    many.edit(places[1], "metric.val/top1", "0.995")
    assert best_of(many) == ([places[0]], [])
    assert reindex(tracking_uri=many.uri).indexed == 1
    assert best_of(many) == ([places[1]], [])  # ... until it is made anew


def test_versions_that_are_not_indexed_are_found_and_reindex_is_named(many: ManyVersions) -> None:
    for value in range(4):
        add_usual(many, value / 10)
    assert is_complete(many.client)
    place = add_usual(many, 0.9, "other", indexed=False)
    for value in range(4):  # versions of this release around it
        add_usual(many, value / 10)
    assert not is_complete(many.client)
    found, (said,) = best_of(many)
    assert found == [place]
    assert said == "reading all versions: some are not indexed; `spikefleet registry reindex` makes lookups fast"
    seen: list[tuple[int, int]] = []
    done = reindex(tracking_uri=many.uri, progress=lambda at, of: seen.append((at, of)))
    assert (done.versions, done.indexed, done.failed) == (9, 1, ())
    assert seen == [(number, 9) for number in range(1, 10)]
    assert best_of(many) == ([place], [])
    many.client.delete_model_version(place[0], str(place[1]))  # the index still proposes it
    assert best_of(many)[0] == [("plain", 4)]
    for number in (1, 2, 3, 5, 6, 7, 8):  # fewer than when the newest was registered
        many.client.delete_model_version("plain", str(number))
    assert best_of(many, top=5) == ([("plain", 4)], [])
    late = add_usual(many, 0.5, indexed=False)
    assert not is_complete(many.client)
    assert best_of(many)[0] == [late]


def test_a_copy_and_a_version_without_its_logged_model_are_found(many: ManyVersions) -> None:
    place, client = add_usual(many, 0.9), many.client
    copied = client.copy_model_version(f"models:/{place[0]}/{place[1]}", "copies")
    client.set_registered_model_alias("copies", "champion", copied.version)
    assert best_of(many, top=2) == ([("copies", 1), place], [])
    many.edit(("copies", 1), INDEXED, None)
    assert reindex(tracking_uri=many.uri).indexed == 1
    assert reindex(tracking_uri=many.uri).indexed == 0
    assert best_of(many, top=2) == ([("copies", 1), place], [])
    run = client.get_model_version(*map(str, place)).run_id
    client.delete_run(run)  # nothing can be logged for it any more
    many.edit(place, INDEXED, None)
    many.edit(place, "metric.val/top1", "0.95")
    ((uri, reason),) = reindex(tracking_uri=many.uri).failed
    assert uri == "models:/plain/1"
    assert "active" in reason
    assert best_of(many)[0] == [place]


def test_a_name_that_is_a_validation_metric_of_some_and_a_metric_of_others(many: ManyVersions) -> None:
    usual = {"timesteps": "2"}
    first = many.add("plain", usual, {"val/top1": 0.9, "energy_mj": 3.0})
    second = many.add("plain", usual, {"val/top1": 0.1, "top1": 0.85, "energy_mj": 2.0})
    many.add("plain", usual, {"val/top1": 0.95, "top1": 0.2, "energy_mj": 1.0})
    assert best_of(many, "top1>0.8", top=3) == ([first, second], [])
    assert best_of(many, "val/top1>0.8", top=3)[0] == [first, ("plain", 3)]


def test_what_was_deleted_beside_a_version_is_made_again_by_reindex(many: ManyVersions) -> None:
    places = [add_usual(many, value / 10) for value in range(1, 4)]
    client = many.client
    (experiment,) = client.search_experiments(filter_string=f"tags.{EXPERIMENT} = '1'")
    logged = {m.tags[VERSION]: m.model_id for m in client.search_logged_models([experiment.experiment_id])}
    client.delete_logged_model(logged["plain/3"])
    assert best_of(many) == ([places[1]], [])  # nothing tells that
    assert reindex(tracking_uri=many.uri).indexed == 1
    assert best_of(many) == ([places[2]], [])
    assert reindex(tracking_uri=many.uri).indexed == 0
    client.delete_experiment_tag(experiment.experiment_id, EXPERIMENT)
    found, (said,) = best_of(many)
    assert (found, "no experiment has the tag" in said) == ([places[2]], True)
    assert reindex(tracking_uri=many.uri).indexed == 0
    assert best_of(many) == ([places[2]], [])


def test_a_deleted_experiment_hides_no_version(many: ManyVersions) -> None:
    place = add_usual(many, 0.9)
    many.client.delete_experiment(many.client.get_experiment_by_name("many").experiment_id)
    assert best_of(many) == ([place], [])


def test_the_number_of_statements_does_not_grow_with_the_number_of_versions(many: ManyVersions) -> None:
    dice = random.Random(0)
    for number in range(10):
        tags = {"timesteps": dice.choice(["1", "2"]), "bound": "4"}
        many.add(f"model{number % 2}", tags, {"val/top1": dice.random(), "energy_mj": 80 * dice.random()})
    wheres = (None, "timesteps<=2 and energy_mj<60 and params_m<25", "timesteps * bound <= 8")

    def statements() -> list[int]:
        counts = []
        for where in wheres:
            best_of(many, where)
            with counted_statements() as sent:
                assert best_of(many, where)[1] == []
            counts.append(len(sent))
        return counts

    few = statements()
    many.multiply(300)
    versions = find_versions(many.client)
    assert len(versions) == 300
    assert statements() == few
    assert max(few) < 50
    eligible = [v for v in versions if v.metrics["energy_mj"] < 60 and v.tags["timesteps"] in ("1", "2")]
    expected = sorted(eligible, key=lambda v: -v.metrics["val/top1"])[:5]
    assert best_of(many, wheres[1], top=5) == ([(v.name, v.version) for v in expected], [])


def test_the_commands_print_a_table_json_and_what_was_indexed(
    many: ManyVersions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", many.uri)
    monkeypatch.setattr(console, "width", 200)

    def call(*words: str) -> tuple[str, str]:
        done = CliRunner().invoke(app, ["registry", *words])
        assert done.exit_code == 0, done.output
        return done.stdout, done.stderr

    facts = {"bound": "4", "data_hash": "abcdef" * 10}
    many.add("plain", {"timesteps": "2", **facts}, {"val/top1": 0.8, "test/top1": 0.7, "energy_mj": 3.5})
    many.add("plain", {"timesteps": "4", **facts}, {"val/top1": 0.9, "energy_mj": 2.5}, indexed=False)
    many.add("plain", {"timesteps": "4", "spike_driven": "refuted"}, {"val/top1": 0.99})
    many.client.set_registered_model_alias("plain", "champion", "1")
    asked = ("best", "--task", "classification", "--dataset", "digits", "--metric", "top1", "--where", "params_m<25")
    table, said = call(*asked, "--top", "5")
    assert "reading all versions: some are not indexed; `spikefleet registry reindex`" in " ".join(said.split())
    lines = [line.split() for line in table.splitlines() if "plain/" in line]
    assert [[cell for cell in line if cell not in "│┃"][:10] for line in lines] == [
        ["plain/2", "-", "90.00%", "-", "4", "4", "2.5", "-", "308074", "abcdefabcdef"],
        ["plain/1", "champion", "80.00%", "70.00%", "2", "4", "3.5", "-", "308074", "abcdefabcdef"],
    ]
    assert call("reindex")[0] == "1 of 3 versions indexed; 2 were indexed before\n"
    assert call("reindex")[0] == "0 of 3 versions indexed; 3 were indexed before\n"
    answer, said = call(*asked, "--top", "2", "--any-proof", "--json")
    assert [version["uri"] for version in json.loads(answer)] == ["models:/plain/3", "models:/plain/2"]
    assert "reading" not in said
