"""The program as a user meets it: the main job, every command after it, and a sentence for whatever is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from spikefleet.cli import app
from spikefleet_pipelines.store.reader import Store
from support.forked import command

SPIKEFLEET = str(Path(sys.executable).with_name("spikefleet"))
QUICK = ["train.epochs=6", "model.width=0.25"]


class Desk:
    """A working directory in which commands are given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [SPIKEFLEET, *words],
            cwd=self.folder,
            env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def ask(self, *words: str) -> str:
        """What a command prints; in this process, which has the libraries loaded."""
        return self._here(words, 0).stdout

    def refuse(self, *words: str) -> str:
        """The sentence of a command that ends with exit code 2; in this process."""
        return " ".join(self._here(words, 2).stderr.split())

    def _here(self, words: tuple[str, ...], code: int) -> Result:
        with contextlib.chdir(self.folder):
            done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, words)
        assert done.exit_code == code, f"{words}: exit code {done.exit_code}\n{done.output}\n{done.exception!r}"
        return done


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A desk where the main job has been done once, with two Ray Train workers."""
    desk = Desk(tmp_path_factory.mktemp("desk"))
    desk.ask("data", "prepare", "digits")
    words = ("train", "digits", "--workers", "2", "--name", "main", *QUICK)
    process = command(desk.folder / "said.txt", *words, folder=desk.folder)
    said = process.wait(280)
    assert process.returncode == 0, said
    assert "2 Ray Train workers on CPU; global batch 64 = 32 x 2" in said
    assert "sg_resnet_digits version 1 is champion" in said
    for chatter in ("Traceback", "(RayTrainWorker", "raylet", "INFO", "WARNING", "UserWarning"):
        assert chatter not in said
    return desk


@pytest.fixture
def empty(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture(scope="module")
def picture(desk: Desk) -> Path:
    """A test digit as a picture file, three times as large."""
    split = Store.open(desk.folder / "stores" / "digits").split("test")
    path = desk.folder / "digit.png"
    Image.fromarray(split.image(0)[0].numpy()).resize((24, 24), Image.Resampling.NEAREST).save(path)
    return path


def test_the_same_command_again_finds_the_run_complete(desk: Desk) -> None:
    assert "run main is complete" in desk.ask("train", "digits", "--workers", "2", "--name", "main", *QUICK)
    assert "run main is complete" in desk.ask("train", "digits", "--resume", "main")
    assert json.loads(desk.ask("registry", "list", "--json"))[0]["versions"][1:] == []


def test_evaluation_of_champion_run_and_checkpoint_agree(desk: Desk) -> None:
    run = json.loads((desk.folder / "runs/main/run.json").read_text())
    checkpoints = sorted((desk.folder / "runs/main/checkpoints").iterdir())
    wanted = f"top1 {run['test']['top1']:.2%}"
    for reference in ("models:/sg_resnet_digits@champion", "models:/sg_resnet_digits/1", "main"):
        assert wanted in desk.ask("evaluate", reference)
    said = desk.ask("evaluate", str(checkpoints[-1]), "--split", "val", "--out", "report")
    assert "on 143 val samples" in said
    assert {path.name for path in (desk.folder / "report").iterdir()} == {"confusion.png", "evaluation.json"}


def test_prediction_of_files_and_folders(desk: Desk, picture: Path) -> None:
    model = "models:/sg_resnet_digits@champion"
    assert "digit.png" in desk.ask("predict", model, picture.name, picture.name, "--out", "predictions.png")
    with Image.open(desk.folder / "predictions.png") as drawn:
        assert drawn.width > 100
    folder = desk.folder / "pictures"
    folder.mkdir()
    picture.rename(folder / picture.name)
    answer = json.loads(desk.ask("predict", model, "pictures", "--json"))
    (folder / picture.name).rename(picture)
    assert len(answer["classes"]) == 5
    assert sum(one["probability"] for one in answer["classes"]) == pytest.approx(1, abs=0.2)


def test_registry_answers(desk: Desk) -> None:
    (best,) = json.loads(desk.ask("registry", "best", "--task", "classification", "--metric", "top1", "--json"))
    assert best["aliases"] == ["champion"]
    assert best["tags"]["connection"] == "bsg"
    assert best["tags"]["timesteps"] == "4"
    where = ["--where", "timesteps<=2"]
    sentence = desk.refuse("registry", "best", "--task", "classification", "--metric", "top1", *where)
    assert "timesteps" in sentence
    assert "sg_resnet_digits/1" in desk.ask("registry", "show", "sg_resnet_digits")
    assert "sg_resnet_digits" in desk.ask("registry", "list")
    desk.ask("registry", "pull", "sg_resnet_digits@champion", "--out", "pulled")
    assert "top1" in desk.ask("evaluate", "pulled")


def test_registered_model_is_what_mlflow_loads(desk: Desk) -> None:
    """In a fresh process that knows only the tracking server, without unpickling."""
    code = (
        "import mlflow, numpy as np; model = mlflow.pyfunc.load_model('models:/sg_resnet_digits@champion');"
        "print(*np.asarray(model.predict(np.zeros((2, 1, 8, 8), np.uint8))).sum(axis=1))"
    )
    uri = f"sqlite:///{desk.folder}/runs/mlflow.db"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [float(word) for word in done.stdout.split()[-2:]] == pytest.approx([1, 1], abs=1e-6)


def test_what_mlflow_holds(desk: Desk) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{desk.folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "main"
    assert run.data.params["model.timesteps"] == "4"
    assert run.data.params["cluster.max_failures"] == "3"
    assert {"code_version", "dataset", "recipe", "spike_driven", "task"} <= run.data.tags.keys()
    assert all(run.data.tags.values()), "a tag is empty"
    assert {key: run.data.params[key] for key in ("T", "D")} == {"T": "4", "D": "1"}
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.name == "digits"
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("Training of recipe digits on data set digits, T = 4, D = 1.\n\n**val/top1 ")
    assert "[sg_resnet_digits version 1](" in note
    assert "became champion: version 1 is the first" in note
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    for key in ("train/loss", "images_per_second", "gradient/first_layer_norm", "epoch/val/top1", "best/val/top1"):
        assert key in run.data.metrics, key
    assert run.data.metrics["test/top1"] > 0.5
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id, "report")}
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {
        "environment.json",
        "layers.json",
        "layer_energy.json",
    }
    wanted = ("confusion.png", "predictions.png", "learning_curve.png", "evaluation.json")
    assert {f"report/{name}" for name in wanted} <= artifacts
    assert client.list_artifacts(run.info.run_id, "layers")
    assert client.list_artifacts(run.info.run_id, "gradients")


def test_recipes_config_sources_and_doctor(desk: Desk) -> None:
    assert "imagenet_sg_resnet50" in desk.ask("recipes")
    assert "timesteps: 2" in desk.ask("config", "show", "digits", "model.timesteps=2")
    assert "fashion_mnist" in desk.ask("data", "sources")
    assert "1295" in desk.ask("data", "show", "stores/digits")
    findings = desk.ask("doctor")
    assert "torch 2" in findings
    assert "spiking unit" in findings
    assert any(f"{form} on the CPU" in " ".join(findings.split()) for form in ("lean", "native"))


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("recipes", {"recipe", "header"}),
        ("searches", {"search", "recipe", "space", "objectives"}),
        ("tables", {"table", "title", "paper", "rows", "scales"}),
        ("data sources", {"source", "description", "files", "options"}),
        ("data show digits", {"source", "splits", "content_hash", "class_names"}),
        ("data prepare digits", {"source", "splits", "content_hash", "class_names"}),
        ("doctor", {"fit", "findings"}),
        ("evaluate main", {"network", "split", "samples", "metrics", "spikes"}),
        ("spike-check main --images 2 --measured 8", {"verdict", "proof"}),
        ("energy main --images 2", {"rows", "totals"}),
        ("evaluate main --precision int8", {"network", "metrics", "precision", "rounding"}),
        ("spike-check main --images 2 --measured 8 --precision int8", {"verdict", "proof", "precision", "rounding"}),
        ("energy main --images 2 --precision int8", {"rows", "totals", "precision"}),
        ("gradients main --images 8", {"layers", "findings", "first_to_last", "step"}),
        ("train digits --resume main", {"run", "validation", "test", "registered", "report"}),
        ("registry list", {"name", "versions"}),
        ("registry show sg_resnet_digits", {"uri", "metrics", "aliases"}),
    ],
)
def test_json_is_alone_on_stdout(words: str, keys: set[str], desk: Desk) -> None:
    answer = json.loads(desk.ask(*words.split(), "--json"))
    assert keys <= (answer[0] if isinstance(answer, list) else answer).keys()


def test_progress_is_beside_the_results(desk: Desk) -> None:
    done = desk.run("evaluate", "main", "--json")
    assert json.loads(done.stdout)["metrics"]["top1"] > 0.5
    assert "loading torch" not in done.stdout


def test_a_store_and_a_run_go_by_their_names(desk: Desk) -> None:
    shown = desk.ask("data", "show", "digits")
    assert shown == desk.ask("data", "show", "stores/digits")
    assert Store.open(desk.folder / "stores/digits").manifest.content_hash in shown
    assert "0 records delivered" in desk.ask("tracking", "sync", "main")
    assert "0 records delivered" in desk.ask("tracking", "sync", "runs/main", "--runs-dir", "elsewhere")
    assert "expected one of main" in desk.refuse("tracking", "sync", "gone")


def test_a_split_is_taken_beside_the_store_wherever_one_stands(desk: Desk) -> None:
    inside = Desk(desk.folder / "stores/digits")
    taken = json.loads(inside.ask("data", "split", ".", "--gate", "0.1", "--json"))
    assert Path(taken["store"]) == desk.folder.resolve() / "stores/digits-gate"
    assert taken["splits"]["gate"] == 129
    assert "is the store that the split is taken from" in desk.refuse(
        "data", "split", "digits", "--gate", "0.1", "--out", "stores/digits", "--overwrite"
    )


def test_a_taken_port_is_refused_at_once(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used" in desk.refuse("ui", "--port", str(port))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("train", "digit"), ("recipe 'digit' does not exist", "did you mean 'digits'")),
        (("train", "digits", "model.timestep=2"), ("unknown key 'model.timestep'", "'model.timesteps'")),
        (("train", "digits", "model.timesteps=0"), ("model.timesteps=0", "greater than or equal to 1")),
        (("train", "digits", "optim.lr=fast"), ("optim.lr='fast'", "number")),
        (("train", "digits", "--workers", "3"), ("global_batch=64", "63 or 66")),
        (("train", "digits", "--runs-dir", "/proc/none", "--workers", "0"), ("/proc/none", "--runs-dir")),
        (("train", "digits", "data.transform.normalise=cifar10"), ("normalise.mean has 3 values", "1 channels")),
        (("train", "digits", "model.in_channels=3"), ("model.in_channels=3", "1 channel;")),
        (("train", "digits", "registry.name=../x"), ("registry.name='../x'",)),
        (("train", "digits", "data.store=s3://key:secret@bucket/x"), ("data.store", "credentials")),
        (("train", "digits", "--name", "a/b"), ("run name 'a/b'", "1 to 100 letters")),
        (("train", "digits", "--resume", "gone"), ("run 'gone' does not exist",)),
        (("train", "digits", "--gpu", "--workers", "0"), ("--gpu needs a CUDA device",)),
        (("train", "digits", "model.num_classes=3", "--workers", "0"), ("10 classes", "model.num_classes=10")),
        (("train", "digits", "--address", "127.0.0.1:1"), ("127.0.0.1:1", "--address")),
        (("train", "digits", "--address", "nowhere"), ("'nowhere'", "HOST:PORT")),
        (("train", "cifar10_sg_resnet10"), ("cifar10", "spikefleet data prepare cifar10")),
        (("train", "cifar10_sg_resnet10", "data.root=gone"), ("gone", "spikefleet data prepare cifar10")),
        (("data", "prepare", "digit"), ("'digit'", "'digits'")),
        (("data", "prepare", "yolo"), ("root is not set", "data prepare yolo DIR")),
        (("data", "prepare", "YOLOv8"), ("source 'yolo'", "data prepare yolo DIR")),
        (("data", "prepare", "pascal"), ("source 'voc'", "Annotations/")),
        (("data", "prepare", "csv"), ("labels.csv",)),
        (("data", "prepare", "roboflow"), ("by the layout of the files", "data prepare roboflow DIR")),
        (("data", "prepare", "auto", "gone"), ("gone is not a directory",)),
        (("data", "prepare", "digits", "--option", "upsample=3"), ("upsample", "3")),
        (("data", "prepare", "digits", "--option", "upsample"), ("key=value",)),
        (("data", "prepare", "digits", "--option", "upsampel=2"), ("unknown option 'upsampel'", "'upsample'")),
        (("data", "show", "gone"), ("gone is not a store", "--out gone")),
        (("evaluate", "net@champion"), ("'net@champion'", "models:/net@champion")),
        (("evaluate", "models:/gone@champion"), ("no registry", "mlflow.db")),
        (("evaluate", "gone"), ("run 'gone' does not exist",)),
        (("registry", "show", "gone"), ("no registry",)),
        (("tracking", "sync", "gone"), ("gone",)),
    ],
)
def test_bad_input_gets_a_sentence_and_leaves_nothing(
    words: tuple[str, ...], parts: tuple[str, ...], empty: Desk
) -> None:
    sentence = empty.refuse(*words)
    for part in parts:
        assert part in sentence
    left = {path.name for path in empty.folder.rglob("*") if path.is_file()}
    assert not [name for name in left if "step-" in name or name.endswith((".safetensors", ".partial"))]
    assert not list(empty.folder.rglob("run.json"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("evaluate", "models:/sg_resnet_digit@champion"), ("sg_resnet_digit", "sg_resnet_digits")),
        (("evaluate", "models:/sg_resnet_digits/9"), ("9",)),
        (("registry", "show", "gone"), ("gone", "sg_resnet_digits")),
        (("registry", "pull", "../x@champion", "--out", "o"), ("../x",)),
        (("registry", "best", "--task", "detection", "--metric", "top1"), ("detection", "classification")),
        (("registry", "best", "--task", "classification", "--metric", "map50"), ("map50",)),
    ],
)
def test_registry_lookups_that_find_nothing(words: tuple[str, ...], parts: tuple[str, ...], desk: Desk) -> None:
    sentence = desk.refuse(*words)
    for part in parts:
        assert part in sentence


def test_resumption_with_another_configuration_is_refused_field_by_field(desk: Desk) -> None:
    before = (desk.folder / "runs/main/config.json").read_bytes()
    sentence = desk.refuse("train", "digits", "--workers", "2", "--name", "main", *QUICK, "model.timesteps=2")
    assert "model.timesteps: expected 4, found 2" in sentence
    resumed = desk.refuse("train", "digits", "--resume", "main", "optim.lr=0.3")
    assert "optim.lr: expected 0.1, found 0.3" in resumed
    assert (desk.folder / "runs/main/config.json").read_bytes() == before
    assert "by recipe 'digits'" in desk.refuse("train", "cifar10_sg_resnet10", "--resume", "main")
    assert "give one of them" in desk.refuse("train", "digits", "--resume", "main", "--name", "other")


def test_pictures_that_cannot_be_read(desk: Desk) -> None:
    model = "models:/sg_resnet_digits@champion"
    (desk.folder / "text.png").write_text("no picture")
    (desk.folder / "hollow").mkdir()
    assert "text.png cannot be read" in desk.refuse("predict", model, "text.png")
    assert "gone.png does not exist" in desk.refuse("predict", model, "gone.png")
    assert "has no images" in desk.refuse("predict", model, "hollow")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(desk.folder / "black.png")
    assert "must end in .png" in desk.refuse("predict", model, "black.png", "--out", "x.jpg")


def test_one_bad_image_among_many_is_named_at_the_end(desk: Desk) -> None:
    model = "models:/sg_resnet_digits@champion"
    shots = desk.folder / "shots"
    (shots / "more").mkdir(parents=True)
    for number, place in enumerate((shots, shots, shots / "more")):
        Image.fromarray(np.full((64, 40), 60 * number, np.uint8)).save(place / f"{number}.png")
    whole = (shots / "1.png").read_bytes()
    (shots / "._0.png").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(100))
    (shots / "empty.png").touch()
    (shots / "late.png").write_bytes(whole[: len(whole) // 2])
    (shots / "gone.png").symlink_to("/nowhere/gone.png")
    (shots / "folder.png").mkdir()
    done = desk._here(("predict", model, "shots", "--out", "shots.png"), 1)
    assert [line.split(":")[0] for line in done.stdout.splitlines()[:2]] == ["shots/0.png", "shots/1.png"]
    said = done.stderr
    assert "5 of 7 images cannot be read; the others are answered:" in said
    for reason in (
        "shots/._0.png: it is no image but a file of macOS beside one (AppleDouble",
        "shots/empty.png: the file has 0 bytes",
        "shots/late.png: the PNG is truncated",
        "shots/gone.png: it is a link to /nowhere/gone.png, which does not exist",
        "shots/folder.png: it is a folder, although it is named as an image",
        "not used: 1 image files in a sub-folder; --recursive reads sub-folders",
    ):
        assert reason in said
    assert (desk.folder / "shots.png").stat().st_size > 1000
    lines = [json.loads(line) for line in desk._here(("predict", model, "shots", "--json"), 1).stdout.splitlines()]
    assert ["error" in line for line in lines] == [True, False, False, True, True, True, True]
    for name in ("._0.png", "empty.png", "late.png", "gone.png"):
        (shots / name).unlink()
    (shots / "folder.png").rmdir()
    answers = [json.loads(line) for line in desk.ask("predict", model, "shots", "--recursive", "--json").splitlines()]
    assert [Path(one["image"]).name for one in answers] == ["0.png", "1.png", "2.png"]


def test_corrupt_shard_is_named_with_its_hash(desk: Desk) -> None:
    desk.ask("data", "prepare", "digits", "--out", "spoilt")
    shard = max((desk.folder / "spoilt").glob("*.arrow"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    sentence = desk.refuse("train", "digits", "data.store=spoilt", "--workers", "0")
    assert shard.name in sentence
    assert "SHA-256" in sentence


@pytest.mark.parametrize("words", [("--workers", "64"), ("--workers", "1", "--gpu")])
def test_more_than_there_is_is_refused_and_leaves_no_run(words: tuple[str, ...], empty: Desk) -> None:
    import torch

    if "--gpu" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    sentence = empty.refuse("train", "digits", *words)
    assert ("needs 64 CPUs" if "64" in words else "needs 1 GPU ") in sentence
    assert not list(empty.folder.rglob("run.json"))


def test_a_refusal_as_the_shell_sees_it(empty: Desk) -> None:
    done = subprocess.run([SPIKEFLEET, "train", "digit"], cwd=empty.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: recipe 'digit' does not exist; did you mean 'digits'?\n"
