"""The registry against real MLflow, in SQLite and behind a server, with real (tiny) networks."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spikefleet.data_summary import DATA_SUMMARY, DataSummary
from spikefleet.errors import UserError
from spikefleet.files import sha256_of
from spikefleet.registry.api import RegisteredVersion, best, describe, list_models, load, promote, pull, register, show
from spikefleet.registry.package import CARD, CONFIG, WEIGHTS, load_network, picture_batch
from spikefleet.tracking.mlflow_client import quiet_mlflow, resolve_tracking_uri
from spikefleet.tracking.tracker import Tracker
from spikefleet_models.families import build_model, model_config
from spikefleet_pipelines.transforms.classification_config import TransformConfig

quiet_mlflow()

import mlflow  # noqa: E402
from mlflow import MlflowClient  # noqa: E402

DIGITS = DataSummary("digits", "d" * 64, tuple(map(str, range(10))), (), (1, 8, 8))


@dataclass(frozen=True)
class Trained:
    """A network as a run leaves it behind."""

    weights: Path
    config: dict[str, Any]
    tags: dict[str, object]
    run_id: str
    uri: str

    def register(self, name: str, value: float = 0.9, **changes: Any) -> RegisteredVersion:
        arguments: dict[str, Any] = {
            "weights": self.weights,
            "config": self.config,
            "data": DIGITS,
            "tags": self.tags,
            "metrics": {"val/top1": value, "test/top1": value - 0.01},
            "run_id": self.run_id,
            "tracking_uri": self.uri,
        }
        return register(name, **(arguments | changes))

    def again(self, seed: int, directory: Path, **overrides: Any) -> "Trained":
        """Another training of the same run: other weights, perhaps another network."""
        torch.manual_seed(seed)
        model = model_config("sg_resnet_tiny", stages=(1, 1), **overrides)
        weights = directory / f"{seed}.safetensors"
        save_file(build_model(model).state_dict(), weights)
        return replace(self, weights=weights, config={**self.config, "model": model.model_dump(mode="json")})


def trained(directory: Path, uri: str) -> Trained:
    tracker = Tracker.open(directory / "first", "first", "digits", uri)
    assert tracker.finish("FINISHED", wait_s=30) == 0
    transform = TransformConfig(normalise="digits")
    config = {"task": "classification", "data": {"source": "digits", "transform": transform.model_dump(mode="json")}}
    tags: dict[str, object] = {"recipe": "digits", "run_name": "first", "seed": 0}
    bare = Trained(Path(), config, tags, str(tracker.run_id), uri)
    return bare.again(0, directory)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uri(runs: Path) -> str:
    return resolve_tracking_uri(runs)


@pytest.fixture(scope="module")
def first(runs: Path, uri: str) -> Trained:
    return trained(runs, uri)


@pytest.fixture(scope="module")
def registered(first: Trained) -> RegisteredVersion:
    version = first.register("digits")
    promote("digits", version.version, "val/top1", tracking_uri=first.uri)
    return version


@pytest.fixture
def pulled(registered: RegisteredVersion, uri: str, tmp_path: Path) -> Path:
    return pull("models:/digits@champion", tmp_path / "pulled", tracking_uri=uri)


@pytest.fixture
def images() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)


def stored_files(uri: str, version: RegisteredVersion) -> Path:
    """Where MLflow keeps the files of a version, as somebody with access to that storage sees them."""
    source = MlflowClient(uri, registry_uri=uri).get_model_version(version.name, str(version.version)).source
    return Path(source.removeprefix("file://"))


# ------------------------------------------------------------------------------------------- register and load


def test_a_registered_network_says_what_a_deployer_asks(first: Trained, registered: RegisteredVersion) -> None:
    assert (registered.name, registered.version, registered.run_id) == ("digits", 1, first.run_id)
    assert registered.metrics == {"val/top1": 0.9, "test/top1": 0.89}
    network, _ = load_network_of(first)
    expected = {
        "task": "classification",
        "dataset": "digits",
        "timesteps": "4",
        "connection": "bsg",
        "decoder": "asd",
        "neuron": "if",
        "family": "sg_resnet",
        "seed": "0",
        "run_name": "first",
        "parameters": str(sum(parameter.numel() for parameter in network.parameters())),
    }
    assert {key: registered.tags[key] for key in expected} == expected
    assert registered.content_hash == show("digits", tracking_uri=first.uri).versions[-1].content_hash


def load_network_of(origin: Trained) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    network = build_model(model_config("sg_resnet_tiny", stages=(1, 1)))
    network.load_state_dict(load_file(origin.weights))
    return network.eval(), origin.config


def test_loading_gives_the_same_bits(first: Trained, registered: RegisteredVersion) -> None:
    original, _ = load_network_of(first)
    batch = torch.rand(4, 1, 8, 8)
    for reference in ("models:/digits@champion", "models:/digits/1"):
        network = load(reference, tracking_uri=first.uri)
        assert not network.training
        assert network.config.timesteps == 4
        assert torch.equal(network(batch), original(batch))


def test_mlflow_loads_it_in_a_fresh_process(
    first: Trained, registered: RegisteredVersion, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    program = """
        import sys, mlflow, numpy
        model = mlflow.pyfunc.load_model("models:/digits@champion")
        numpy.save(sys.argv[2], model.predict(numpy.load(sys.argv[1])))
        try:
            model.predict(numpy.zeros((1, 1, 8, 8), numpy.float32))
        except mlflow.exceptions.MlflowException as error:
            print(error)
    """
    np.save(tmp_path / "images.npy", images)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": first.uri}
    arguments = [sys.executable, "-c", textwrap.dedent(program), tmp_path / "images.npy", tmp_path / "out.npy"]
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "uint8" in done.stdout
    assert "UserWarning" not in done.stderr

    probabilities = np.load(tmp_path / "out.npy")
    network, config = load_network_of(first)
    with torch.inference_mode():
        expected = network(picture_batch(images, config).images).softmax(1).numpy()
    assert probabilities.shape == (5, 10)
    np.testing.assert_array_equal(probabilities, expected)


def test_a_version_holds_no_pickle_and_nothing_of_the_directory_it_came_from(
    first: Trained, registered: RegisteredVersion
) -> None:
    stored = stored_files(first.uri, registered)
    names = sorted(str(path.relative_to(stored)) for path in stored.rglob("*") if path.is_file())
    assert [name for name in names if name.endswith((".pkl", ".pt", ".pth", ".bin"))] == []
    assert {f"artifacts/{name}" for name in (WEIGHTS, CONFIG, CARD)} < set(names)
    assert not {"uv.lock", "pyproject.toml"} & set(names)
    assert "spikefleet==" in (stored / "requirements.txt").read_text()
    assert "python_model: " not in (stored / "MLmodel").read_text()


def test_the_same_content_of_the_same_run_is_one_version(first: Trained, tmp_path: Path) -> None:
    version = first.register("once")
    assert first.register("once") == version
    other = first.again(5, tmp_path).register("once")
    assert other.version == 2
    assert [v.version for v in show("once", tracking_uri=first.uri).versions] == [2, 1]


def test_a_crash_before_the_version_is_created_leaves_none(first: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", crash)
        with pytest.raises(KeyboardInterrupt):
            first.register("crashed")
    with pytest.raises(UserError, match="no registered model 'crashed'"):
        show("crashed", tracking_uri=first.uri)
    assert first.register("crashed").version == 1


def test_weights_that_are_not_the_configurations_are_not_registered(first: Trained, tmp_path: Path) -> None:
    wider = first.again(1, tmp_path, width=0.25)
    with pytest.raises(UserError, match="has shape"):
        wider.register("mismatch", config=first.config)
    with pytest.raises(UserError, match="there is no such file"):
        first.register("mismatch", weights=tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="val/top1 is nan"):
        first.register("mismatch", value=float("nan"))
    with pytest.raises(UserError, match="lacks the sections"):
        first.register("mismatch", config={"model": first.config["model"]})
    with pytest.raises(UserError, match=r"model\.timestepz"):
        first.register("mismatch", config={**first.config, "model": {**first.config["model"], "timestepz": 4}})
    assert "mismatch" not in [model.name for model in list_models(tracking_uri=first.uri)]


# ----------------------------------------------------------------------------------------- look up and promote


@pytest.fixture(scope="module")
def catalogue(first: Trained, tmp_path_factory: pytest.TempPathFactory) -> list[RegisteredVersion]:
    directory = tmp_path_factory.mktemp("weights")
    versions = []
    choices = [(1, "bsg", 0.91, 3.5), (2, "bsg", 0.95, 9.0), (2, "add", 0.95, 8.0), (4, "bsg", 0.97, 20.0)]
    for seed, (timesteps, connection, top1, energy) in enumerate(choices, start=10):
        candidate = first.again(seed, directory, timesteps=timesteps, connection=connection)
        metrics = {"val/top1": top1, "test/top1": 1 - top1, "energy_mj": energy}
        tags = {**first.tags, "dataset": "cat" if seed < 13 else "dog"}
        versions.append(candidate.register(f"catalogue{seed % 2}", metrics=metrics, tags=tags))
    return versions


@given(
    dataset=st.sampled_from(["cat", "dog"]),
    metric=st.sampled_from(["top1", "val/top1", "test/top1", "energy_mj"]),
    mode=st.sampled_from(["max", "min"]),
    timesteps=st.none() | st.tuples(st.sampled_from(["<=", ">", "==", "!="]), st.integers(0, 5)),
    energy=st.none() | st.floats(0, 25),
    connection=st.none() | st.sampled_from(["bsg", "add", "iand"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_best_is_what_brute_force_finds(
    catalogue: list[RegisteredVersion],
    uri: str,
    dataset: str,
    metric: str,
    mode: Any,
    timesteps: tuple[str, int] | None,
    energy: float | None,
    connection: str | None,
) -> None:
    parts, kept = [], [version for version in catalogue if version.tags["dataset"] == dataset]
    if timesteps is not None:
        op, bound = timesteps
        parts.append(f"timesteps{op}{bound}")
        compare = {"<=": int.__le__, ">": int.__gt__, "==": int.__eq__, "!=": int.__ne__}[op]
        kept = [version for version in kept if compare(int(version.tags["timesteps"]), bound)]
    if energy is not None:
        parts.append(f"energy_mj<{energy}")
        kept = [version for version in kept if version.metrics["energy_mj"] < energy]
    if connection is not None:
        parts.append(f"connection=={connection}")
        kept = [version for version in kept if version.tags["connection"] == connection]
    where = " and ".join(parts) or None
    if not kept:
        with pytest.raises(UserError, match="satisfies where"):
            best("classification", metric, dataset, where, mode, tracking_uri=uri)
        return
    name = "val/top1" if metric == "top1" else metric
    extreme = (max if mode == "max" else min)(version.metrics[name] for version in kept)
    oldest = next(version for version in kept if version.metrics[name] == extreme)
    assert best("classification", metric, dataset, where, mode, tracking_uri=uri) == oldest


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"task": "detection"}, "for task 'detection'; there are classification"),
        ({"dataset": "cow"}, "for dataset 'cow'; there are .*cat, .*dog"),
        ({"metric": "map50_95"}, "metric 'map50_95'; there are .*energy_mj"),
        ({"where": "timestep<=2"}, "no version has 'timestep'; did you mean 'timesteps'"),
        ({"where": "timesteps"}, "is no condition"),
    ],
)
def test_a_question_without_an_answer_says_what_there_is(
    catalogue: list[RegisteredVersion], uri: str, arguments: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        best(**({"task": "classification", "metric": "top1"} | arguments), tracking_uri=uri)  # type: ignore[arg-type]


def test_the_champion_changes_only_for_a_better_version(first: Trained, tmp_path: Path) -> None:
    outcomes = []
    for seed, value in enumerate([0.80, 0.85, 0.85, 0.82, 0.90], start=20):
        version = first.again(seed, tmp_path).register("climb", value)
        outcomes.append(promote("climb", version.version, "top1", tracking_uri=first.uri))
    assert [promotion.alias for promotion in outcomes] == [
        "champion",
        "champion",
        "challenger",
        "challenger",
        "champion",
    ]
    assert [promotion.champion for promotion in outcomes] == [1, 2, 2, 2, 5]
    assert outcomes[3].reason == "top1 0.82 of version 4 is not better than 0.85 of champion version 2 (max)"
    model = show("climb", tracking_uri=first.uri)
    assert {version.version: version.aliases for version in model.versions if version.aliases} == {
        5: ("champion",),
        4: ("challenger",),
    }
    again = promote("climb", 5, "top1", tracking_uri=first.uri)
    assert (again.alias, again.reason) == ("champion", "version 5 is the champion already")
    assert promote("climb", 1, "top1", "min", tracking_uri=first.uri).alias == "champion"
    with pytest.raises(UserError, match=r"no metric 'map'; it has"):
        promote("climb", 1, "map", tracking_uri=first.uri)
    with pytest.raises(UserError, match="no version 9; it has 1, 2, 3, 4, 5"):
        promote("climb", 9, "top1", tracking_uri=first.uri)


def test_a_champion_set_back_by_hand_is_not_replaced_by_the_one_before(first: Trained, tmp_path: Path) -> None:
    for seed, value in enumerate([0.80, 0.95], start=30):
        version = first.again(seed, tmp_path).register("rollback", value)
        promote("rollback", version.version, "top1", tracking_uri=first.uri)
    MlflowClient(first.uri, registry_uri=first.uri).set_registered_model_alias("rollback", "champion", "1")
    third = first.again(32, tmp_path).register("rollback", 0.85)
    assert promote("rollback", third.version, "top1", tracking_uri=first.uri).champion == 3


@pytest.mark.parametrize(("slow", "fast"), [(0.90, 0.95), (0.95, 0.90), (0.90, 0.90)])
def test_of_two_jobs_that_promote_at_once_the_better_one_wins(
    first: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: float, fast: float
) -> None:
    """A slow job has decided; before it moves the alias, another job comes and goes; then the slow one overwrites."""
    name = f"race{slow}-{fast}"
    for seed, value in enumerate([0.5, slow, fast], start=40):
        first.again(seed, tmp_path).register(name, value)
    promote(name, 1, "top1", tracking_uri=first.uri)
    real = MlflowClient.set_registered_model_alias
    champions: list[str] = []
    nested: list[Any] = []

    def slow_job(client: MlflowClient, model: str, alias: str, version: str) -> None:
        if alias == "champion" and not nested:
            nested.append("running")
            nested.append(promote(name, 3, "top1", tracking_uri=first.uri))
        if alias == "champion":
            champions.append(version)
        real(client, model, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", slow_job)
    outcome = promote(name, 2, "top1", tracking_uri=first.uri)
    winner = 2 if slow >= fast else 3
    assert champions == (["2", "2"] if winner == 2 else ["3", "2", "3"])  # the worse one was champion for a moment
    assert outcome.champion == winner
    assert outcome.alias == ("champion" if winner == 2 else "challenger")
    model = show(name, tracking_uri=first.uri)
    assert {version.version for version in model.versions if "champion" in version.aliases} == {winner}


def test_many_jobs_that_promote_at_once_leave_the_best_one(first: Trained, tmp_path: Path) -> None:
    values = [0.5, 0.91, 0.97, 0.93, 0.95]
    for seed, value in enumerate(values, start=60):
        first.again(seed, tmp_path).register("crowd", value)
    promote("crowd", 1, "top1", tracking_uri=first.uri)
    with ThreadPoolExecutor(4) as jobs:
        outcomes = list(jobs.map(lambda number: promote("crowd", number, "top1", tracking_uri=first.uri), range(2, 6)))
    champion = show("crowd", tracking_uri=first.uri).champion
    assert champion is not None
    assert champion.version == 3
    assert outcomes[1].alias == "champion"


def test_an_alias_that_another_job_writes_at_the_same_time_is_written_after_it(
    first: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow refuses the second of two new rows for one alias."""
    first.again(70, tmp_path).register("raced", 0.9)
    real, raced = MlflowClient.set_registered_model_alias, []

    def lose_the_race(self: MlflowClient, name: str, alias: str, version: str) -> None:
        real(self, name, alias, version)
        if not raced:
            raced.append(alias)
            raise mlflow.exceptions.MlflowException("UNIQUE constraint failed: registered_model_aliases.alias")

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lose_the_race)
    assert promote("raced", 1, "top1", tracking_uri=first.uri).alias == "champion"
    assert raced == ["champion"]


def test_a_promotion_that_was_killed_is_made_good_by_the_next_one(
    first: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, value in enumerate([0.5, 0.9, 0.7], start=50):
        first.again(seed, tmp_path).register("killed", value)
    promote("killed", 1, "top1", tracking_uri=first.uri)

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", kill)
        with pytest.raises(KeyboardInterrupt):
            promote("killed", 2, "top1", tracking_uri=first.uri)
    assert promote("killed", 3, "top1", tracking_uri=first.uri).champion == 2


# ------------------------------------------------------------------------------------------ names, URIs, pulling


@pytest.mark.parametrize(
    "name",
    ["", "..", "a/b", "a\\b", "../x", "a..b", "a\0b", "a\nb", "x" * 101, "%2e%2e", "a#b", "a@b", "dіgits", "-a", "a:b"],
)
def test_names_that_could_become_paths_are_refused(first: Trained, name: str) -> None:
    with pytest.raises(UserError, match="model name"):
        first.register(name)
    with pytest.raises(UserError, match="model name"):
        show(name, tracking_uri=first.uri)
    with pytest.raises(UserError, match=r"model name|not a registered version"):
        load(f"models:/{name}/1", tracking_uri=first.uri)


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("models:/digit@champion", "no registered model 'digit'; there are digits"),
        ("models:/digits@best", "no alias 'best'; it has champion"),
        ("models:/digits/77", "no version 77; it has 1"),
        ("models:/digits", "give models:/NAME@champion"),
        ("models:/digits/1/../../x", "give models:/NAME@champion"),
        ("models:/digits/latest", "give models:/NAME@champion"),
        ("no-such-directory", "holds no registered network"),
    ],
)
def test_a_reference_to_nothing_says_what_there_is(
    registered: RegisteredVersion, uri: str, reference: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        load(reference, tracking_uri=uri)


def test_a_pulled_directory_loads_without_a_registry(
    first: Trained, registered: RegisteredVersion, pulled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert sorted(path.name for path in pulled.iterdir()) == [CARD, CONFIG, DATA_SUMMARY, WEIGHTS]
    batch = torch.rand(2, 1, 8, 8)
    assert torch.equal(load(pulled)(batch), load_network_of(first)[0](batch))
    here, there = describe(pulled), describe("models:/digits@champion", tracking_uri=first.uri)
    assert here["sha256"] == there["sha256"]
    assert here["config"] == there["config"] == first.config
    assert here["metrics"] == there["metrics"] == {"val/top1": 0.9, "test/top1": 0.89}
    assert here["tags"]["run_name"] == there["tags"]["run_name"] == "first"
    assert there["aliases"] == ["champion"]


def test_pulling_never_overwrites_and_leaves_nothing_behind(pulled: Path, uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists and is not empty"):
        pull("models:/digits@champion", pulled, tracking_uri=uri)
    (tmp_path / "empty").mkdir()
    assert pull("models:/digits/1", tmp_path / "empty", tracking_uri=uri) == tmp_path / "empty"
    with pytest.raises(UserError, match="no version 9"):
        pull("models:/digits/9", tmp_path / "never", tracking_uri=uri)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "pulled"]


def test_extra_files_travel_with_the_network(first: Trained, tmp_path: Path) -> None:
    (tmp_path / "card of energy").write_text('{"mj": 1.5}')
    version = first.register("energetic", extra_files={"energy.json": tmp_path / "card of energy"})
    out = pull(version.uri, tmp_path / "out", tracking_uri=first.uri)
    assert json.loads((out / "energy.json").read_text()) == {"mj": 1.5}
    with pytest.raises(UserError, match="plain file name"):
        first.register("energetic2", extra_files={"../energy.json": tmp_path / "card of energy"})


def test_a_registry_that_is_away_is_one_sentence_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the registry at http://127.0.0.1:1 fails") as caught:
        list_models(tracking_uri="http://ann:s3cret@127.0.0.1:1")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(UserError, match="there is no registry at sqlite"):
        list_models(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- attacks


class Bomb:
    """Leaves a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


@pytest.fixture
def target(first: Trained, tmp_path: Path) -> Iterator[tuple[RegisteredVersion, Path]]:
    """A version whose stored files an attacker may change; put back afterwards."""
    version = first.register("target")
    stored = stored_files(first.uri, version)
    shutil.copytree(stored, tmp_path / "backup")
    yield version, stored
    shutil.rmtree(stored)
    shutil.copytree(tmp_path / "backup", stored)


def rewrite_card(package: Path, **names: str) -> None:
    """What an attacker does who can also change the card."""
    card = json.loads((package / CARD).read_text())
    card["sha256"] |= {name: sha256_of(package / name) for name in card["sha256"]} | names
    (package / CARD).write_text(json.dumps(card))


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_planted_pickles_are_never_executed(
    target: tuple[RegisteredVersion, Path], uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, stored = target
    marker = tmp_path / "marker"
    for name in ("python_model.pkl", "model.pkl", "weights.pt", "data/model.pth", "pickle_module_info.txt"):
        for place in (stored, stored / "artifacts"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(pickle.dumps(Bomb(marker)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    load(version.uri, tracking_uri=uri)
    mlflow.set_tracking_uri(uri)
    mlflow.pyfunc.load_model(version.uri)
    out = pull(version.uri, tmp_path / "out", tracking_uri=uri)
    assert sorted(path.name for path in out.iterdir()) == [CARD, CONFIG, DATA_SUMMARY, WEIGHTS]

    # MLflow told to take the pickle: refused by its switch.
    description = (stored / "MLmodel").read_text()
    lines = [line for line in description.splitlines() if "model_code_path" not in line]
    flavor = lines.index("  python_function:")
    lines[flavor + 1 : flavor + 1] = ["    python_model: python_model.pkl", "    cloudpickle_version: 3.0.0"]
    (stored / "MLmodel").write_text("\n".join(lines))
    with pytest.raises(mlflow.exceptions.MlflowException, match="pickle is disallowed"):
        mlflow.pyfunc.load_model(version.uri)
    load(version.uri, tracking_uri=uri)
    assert not marker.exists()


def bomb_as_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(marker)))


def bomb_as_torch_file(path: Path, marker: Path) -> None:
    torch.save(Bomb(marker), path)


def bomb_behind_safetensors(path: Path, marker: Path) -> None:
    """A polyglot: valid safetensors at the head, a zip of a torch file at the tail."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(marker)))


@pytest.mark.parametrize("plant", [bomb_as_pickle, bomb_as_torch_file, bomb_behind_safetensors])
@pytest.mark.parametrize("card_too", [False, True])
def test_swapped_weights_are_refused_by_hash(
    target: tuple[RegisteredVersion, Path], uri: str, tmp_path: Path, plant: Any, card_too: bool
) -> None:
    version, stored = target
    expected = sha256_of(stored / "artifacts" / WEIGHTS)
    plant(stored / "artifacts" / WEIGHTS, tmp_path / "marker")
    found = sha256_of(stored / "artifacts" / WEIGHTS)
    if card_too:
        rewrite_card(stored / "artifacts")
        sentence = rf"card\.json is not the card that was registered: expected content hash {version.content_hash}"
    else:
        sentence = rf"weights\.safetensors is not .* expected SHA-256 {expected}, found {found}"
    with pytest.raises(UserError, match=sentence):
        load(version.uri, tracking_uri=uri)
    with pytest.raises(UserError, match=sentence):
        pull(version.uri, tmp_path / "out", tracking_uri=uri)
    mlflow.set_tracking_uri(uri)
    with pytest.raises(UserError, match=r"SHA-256|not a valid safetensors"):  # MLflow's loader knows the card alone
        mlflow.pyfunc.load_model(version.uri)
    assert not (tmp_path / "marker").exists()


def test_weights_that_work_but_are_others_are_refused_by_hash(
    target: tuple[RegisteredVersion, Path], first: Trained, tmp_path: Path
) -> None:
    version, stored = target
    shutil.copyfile(first.again(99, tmp_path).weights, stored / "artifacts" / WEIGHTS)
    rewrite_card(stored / "artifacts")
    load_network(stored / "artifacts")  # the files agree with one another ...
    with pytest.raises(UserError, match="the stored files have been changed"):  # ... but not with the registry
        load(version.uri, tracking_uri=first.uri)


# ----------------------------------------------------------------------------------------------------- server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    options += ["--artifacts-destination", f"{tmp_path}/server-artifacts"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *options],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except (URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def test_the_registry_behind_a_server(server: str, tmp_path: Path, images: np.ndarray[Any, Any]) -> None:
    origin = trained(tmp_path, server)
    version = origin.register("digits")
    assert origin.register("digits") == version
    assert promote("digits", 1, "top1", tracking_uri=server).alias == "champion"
    better = origin.again(1, tmp_path).register("digits", 0.99)
    assert promote("digits", better.version, "top1", tracking_uri=server).champion == 2
    assert best("classification", "top1", where="timesteps==4", tracking_uri=server).version == 2
    assert [model.name for model in list_models(tracking_uri=server)] == ["digits"]

    batch = torch.rand(2, 1, 8, 8)
    network = load("models:/digits/1", tracking_uri=server)
    assert torch.equal(network(batch), load_network_of(origin)[0](batch))
    pulled = pull("models:/digits@champion", tmp_path / "pulled", tracking_uri=server)
    assert describe(pulled)["sha256"] == describe("models:/digits/2", tracking_uri=server)["sha256"]
    mlflow.set_tracking_uri(server)
    assert mlflow.pyfunc.load_model("models:/digits@champion").predict(images).shape == (5, 10)
