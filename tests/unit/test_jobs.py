"""What is made of a command before it is submitted, and the states of runs, without a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from spikefleet.cli import app
from spikefleet.cli.job_entry import refuse_place_in_copy
from spikefleet.cli.submissions import checked
from spikefleet.config.recipes import load_config
from spikefleet.errors import UserError
from spikefleet.jobs import code_package
from spikefleet.jobs.code_package import packed
from spikefleet.jobs.run_state import state_of_job, state_of_run
from spikefleet.jobs.server import Job
from spikefleet.jobs.signal_driver import processes_of
from spikefleet.jobs.stopping import stop_run
from spikefleet.jobs.submission import ENTRY, refuse_secrets
from spikefleet.runs.run_dir import Run, default_run_name
from spikefleet.status import silent
from spikefleet_tune.lock import hold


@pytest.mark.parametrize(
    ("words", "kind", "run"),
    [
        ("train digits --workers 2 --gpu", "train", None),
        ("train digits --name mine --workers 3 train.global_batch=6", "train", "mine"),
        ("train digits --resume mine", "train", "mine"),
        ("tune digits_t_gate_schedule --trials 3", "tune", "digits_t_gate_schedule"),
        ("reproduce sg_resnet_table9", "reproduce", "sg_resnet_table9-digits"),
        ("retrain sg_resnet_digits --from champion", "retrain", "sg_resnet_digits"),
        ("data prepare digits --seed 3", "data-prepare", "digits"),
        ("evaluate models:/x@champion --split val", "evaluate", "x-champion-val"),
    ],
)
def test_each_command_that_can_be_submitted_has_an_id_and_keeps_its_words(
    words: str, kind: str, run: str | None
) -> None:
    submission = checked(words.split(), None)
    assert submission.kind == kind
    if run is None:
        run = default_run_name(load_config("digits", {"cluster.workers": 2, "cluster.gpu": True}))
    assert (submission.run, submission.id) == (run, f"{kind}-{run}")
    assert " ".join(submission.words).startswith(words)
    if kind in ("train", "tune") and "--resume" not in words:
        assert submission.words[submission.words.index("--name") + 1] == run, "the run is named before it runs"
    assert submission.digest != replace(submission, digest="").digest
    shown = submission.metadata()
    assert (shown["kind"], shown["run"], shown["digest"]) == (kind, run, submission.digest)
    assert submission.entry_point("some-id").startswith(f"python -m {ENTRY} some-id ")


def test_the_digest_tells_another_configuration_apart_and_no_other_spelling() -> None:
    first = checked(["train", "digits", "optim.lr=0.5", "--workers", "2", "--name", "a"], None)
    same = checked(["train", "digits", "--name", "a", "optim.lr=0.50", "--workers", "2"], None)
    other = checked(["train", "digits", "optim.lr=0.4", "--workers", "2", "--name", "a"], None)
    assert first.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("train digits optim.lrr=3", "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ("train digits --workers 0", "--workers 0 trains without Ray"),
        ("train digits --name a/b", "run name 'a/b' must have"),
        ("train digits init.from=models:/m@champion", "so name the run here; add --name"),
        ("train digits init.from=weights.safetensors --name a", "init.from 'weights.safetensors' is relative"),
        ("train no_such_recipe", "recipe 'no_such_recipe' does not exist"),
        ("tune no_such_search", "search 'no_such_search' does not exist"),
        ("retrain m --schedule x", "x"),
        ("data prepare no_such_source", "no_such_source"),
        ("data prepare image_folder images", "ROOT 'images' is relative"),
        ("data show x", "'data' cannot be submitted; expected one of train, tune, reproduce, retrain, data prepare"),
        ("predict m a.png", "'predict' cannot be submitted"),
        ("train digits --runs-dir runs", "--runs-dir 'runs' is relative to a directory of this machine"),
        ("train digits --runs-dir s3://b/runs", "checkpoint.mirror=s3://b/runs to keep checkpoints"),
        ("evaluate runs/a/checkpoints/step-00000021", "NETWORK 'runs/a/checkpoints/step-00000021' is relative"),
        ("evaluate models:/x@champion --data stores/x", "--data 'stores/x' is relative"),
        ("retrain m --data stores/x", "--data 'stores/x' is relative"),
        ("retrain m retrain.gate_store=stores/x", "retrain.gate_store 'stores/x' is relative"),
        ("tune digits_t_gate_schedule --objectives top1:up", "top1:up"),
        ("reproduce sg_resnet_table9 --results results", "--results 'results' is relative"),
        ("train digits --stores-dir=stores", "--stores-dir 'stores' is relative"),
        ("train digits data.root=images", "data.root 'images' is relative"),
        ("train digits data.store=s3://me:secret@bucket/x", "data.store holds a password"),
        ("data prepare digits --option token=abc", "token holds a password, or another secret"),
        ("data prepare digits --option api_key=abc", "api_key holds a password"),
        ("data prepare digits --option apikey=x", "apikey holds a password"),
        ("data prepare digits --option aws_credentials=x", "aws_credentials holds a password"),
        ("data prepare digits --token abc", "--token holds a password"),
        ("data prepare digits --hf-token abc", "--hf-token holds a password"),
        ("train digits data.store=s3://b/r?access_key=A&secret_key=me:secret", "data.store holds a password"),
        ("data prepare s3://b/r?region=x&secret_access_key=me:secret", "s3:// holds a password"),
        ("data prepare https://me:secret_abc@github.com/x?a=b", "https:// holds a password"),
        ("data prepare https://ghp_abc@github.com/x", "https:// holds a password"),
        ("train digits checkpoint.mirror=s3://me:secret/cd@b", "checkpoint.mirror holds a password"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(words: str, sentence: str) -> None:
    with pytest.raises((UserError, ValueError), match=None) as refused:
        checked(words.split(), None)
    assert sentence in str(refused.value)
    assert "me:secret" not in str(refused.value)


def test_an_option_that_the_command_does_not_have_is_refused_as_there() -> None:
    with pytest.raises(typer.BadParameter):
        checked(["train", "digits", "--workers", "two"], None)
    checked(["data", "prepare", "digits", "--option", "tokens=3"], None)  # whose name only begins like a secret's
    for words in ("evaluate /runs/a", "evaluate a --data x", "retrain m --data s3://b/x retrain.gate_store=/stores/x"):
        checked(words.split(), None)  # there, by name, or at a URI
    refuse_secrets(["models:/x@champion", "monkey=1", "optim.lr=0.1", "--name", "token", "x", "--token"])


def test_a_recipe_of_this_machine_goes_with_its_directory(tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text("base: digits\nrecipe: mine\n")
    with pytest.raises(
        UserError, match=r"is a file of this machine; send it with its directory: --with-code .*recipes$"
    ):
        checked(["train", str(recipe)], None)
    with pytest.raises(UserError, match=r"is not below "):
        checked(["train", str(recipe)], tmp_path / "elsewhere")
    assert checked(["train", str(recipe)], tmp_path).words[:2] == ("train", "recipes/mine.yaml")


def test_code_is_sent_without_data_and_what_git_ignores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.py", "sub/b.py", "data/x.bin", ".venv/c.py", "runs/r.json", "ignored.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def sent() -> list[str]:
        with packed(tmp_path) as copy:
            return sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())

    assert sent() == ["a.py", "ignored.bin", "sub/b.py"]
    (tmp_path / ".gitignore").write_text("ignored.bin\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert sent() == ["a.py", "sub/b.py"]
    monkeypatch.setattr(code_package, "MOST_BYTES", 5)
    with pytest.raises(UserError, match=r"the largest files are sub/b.py \(0 MB\), a.py"):
        sent()
    with pytest.raises(UserError, match="is no directory"), packed(tmp_path / "none"):
        pass


def test_what_git_tracks_is_sent_and_what_is_not_sent_is_said(tmp_path: Path) -> None:
    folder, other = tmp_path / "code", tmp_path / "other"
    for path in ("pkg/data/loader.py", "data/fixture.json", "data/large.bin", "pkg/runs/plan.py", ".env", "venv/x.py"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)
    (folder / "link.py").symlink_to("pkg/data/loader.py")
    (folder / "outside.py").symlink_to(tmp_path / "elsewhere.py")
    (folder / "env.py").symlink_to(".env")
    (tmp_path / "elsewhere.py").write_text("")
    said: list[str] = []

    def sent() -> dict[str, str]:
        with packed(folder, said.append) as copy:
            files = [path for path in copy.rglob("*") if not path.is_dir()]
            assert not [path for path in files if path.is_symlink()]
            return {str(path.relative_to(copy)): path.read_text() for path in files}

    outside_git = sent()
    assert sorted(outside_git) == ["link.py", "pkg/data/loader.py", "pkg/runs/plan.py"]
    assert outside_git["link.py"] == "pkg/data/loader.py"
    assert said == ["--with-code: 3 files are sent; left out: .env, data, env.py, outside.py, venv"]

    def git(where: Path, *words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
        subprocess.run(["git", "-C", str(where), *identity, *words], check=True, capture_output=True)

    other.mkdir()
    (other / "part.py").write_text("part")
    for where, words in ((other, ["init"]), (other, ["add", "."]), (other, ["commit", "-m", "one"])):
        git(where, *words)
    git(folder, "init")
    git(folder, "add", "data/fixture.json", "pkg")
    git(folder, "submodule", "add", str(other), "sub")
    assert sorted(sent()) == [
        ".gitmodules",
        "data/fixture.json",
        "link.py",
        "pkg/data/loader.py",
        "pkg/runs/plan.py",
        "sub/part.py",
    ]
    assert said[1] == "--with-code: 6 files are sent; left out: .env, data, env.py, outside.py, venv"


def job(**fields: Any) -> Job:
    plain: dict[str, Any] = {
        "id": "train-x",
        "state": "running",
        "metadata": {"kind": "train", "run": "x"},
        "entry_point": "",
        "exit_code": None,
        "message": "Job is currently running.",
        "started": 5.0,
        "ended": None,
    }
    return Job(**{**plain, **fields})


def test_the_state_of_a_job_comes_from_its_log() -> None:
    log = (
        "run x: 2 Ray Train workers on CPU\n84 epochs of 21 steps, from step 0\n"
        "epoch 1/4  train/loss 2.3  val/top1 14.69%  best  0 min 10 s left\n"
        "a worker failed: host 10.0.0.3 is gone\n"
    )
    waits = "host 10.0.0.3 is gone; the run waits for 1 more CPU (1 of 2 there)\n"
    others = "hosts 10.0.0.3, 10.0.0.4 are gone; the run waits for 2 more CPUs (1 of 3 there): 15 s so far\n"
    state = state_of_job(job(), log)
    assert (state.state, state.epoch, state.epochs, state.remaining_s) == ("running", 1, 4, 10.0)
    assert (state.metrics, state.restarts) == ({"val/top1": "14.69%"}, 1)
    state = state_of_job(job(), log + waits)
    assert (state.state, state.detail) == ("waiting", waits.strip())
    assert state.since is None, "the job began long before it waited"
    assert state_of_job(job(), log + others).detail == others.strip()
    assert state_of_job(job(), log + waits + "restarting: 2 s so far\n").state == "running", "the host is back"
    assert state_of_job(job(), log + waits + "resuming from step-00000021 (epoch 2, step 21)\n").state == "running"
    assert state_of_job(job(state="finished", ended=9.0), log + waits).state == "finished"
    search = "host 10.0.0.3 is gone; the search waits for hosts: a trial needs 1 x 1 CPUs, and the cluster has 0 CPUs\n"
    lost = "trial small-0001  runs again: host 10.0.0.3 is gone, 0 of 1 trials at a time\n"
    assert state_of_job(job(), lost).state == "running"
    assert state_of_job(job(), lost + search + search).state == "waiting"
    assert state_of_job(job(), search + "searching: small-0001 epoch 2: 17 s so far\n").state == "running"


@pytest.mark.parametrize(
    ("shown", "value"),
    [("1e-05", "1e-05"), ("-0.25", "-0.25"), ("-3.2e+04", "-3.2e+04"), ("nan%", "nan%"), ("inf", "inf"), ("x", None)],
)
def test_any_number_is_read_as_a_metric(shown: str, value: str | None) -> None:
    state = state_of_job(job(), f"epoch 1/4  train/loss 2.3  val/loss {shown}  best\n")
    assert state.metrics == (None if value is None else {"val/loss": value})


def test_the_run_of_another_user_is_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(process: int, sent: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    run = Run(tmp_path / "run")
    run.path.mkdir()
    monkeypatch.setattr(os, "kill", forbidden)
    with (
        hold(run.path / ".lock"),
        pytest.raises(UserError, match=rf"run run is trained by process {os.getpid()} of another user"),
    ):
        stop_run(run, now=False, announce=silent)


def test_the_state_of_a_run_says_when_its_process_is_gone(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    now = time.time()
    progress = {"epoch": 2, "epochs": 8, "step": 20, "steps": 80, "from_step": 0, "since": now - 10, "at": now}
    run.note(status="running", progress={**progress, "metrics": {"val/top1": 0.5}})
    assert state_of_run(run).state == "killed"
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom spikefleet_tune.lock import hold\n"
        "lock = hold(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(run.path / ".lock")], stdout=subprocess.PIPE, env=dict(os.environ)
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        state = state_of_run(run)
        assert (state.state, state.epoch, state.epochs) == ("running", 2, 8)
        assert state.remaining_s == pytest.approx(30 - (time.time() - now), abs=2)
        run.note(status="waiting", waiting={"for": "1 more CPU", "since": now})
        state = state_of_run(run)
        assert (state.state, state.detail, state.since) == ("waiting", "1 more CPU", now)
        assert json.loads(json.dumps(state.as_data()))["step"] == 20
        (run.path / "config.json").write_text('{"cluster": {"grace_s": 1}}')
        assert stop_run(run, now=False, announce=silent) == "run run has stopped; no checkpoint was saved yet"
        assert holder.wait(10) == -signal.SIGTERM
    finally:
        holder.kill()
        holder.wait()
    assert stop_run(run, now=False, announce=silent) == "run run is not running"
    run.note(status="finished", validation={}, test={}, waiting=None)
    assert state_of_run(run).state == "finished"
    done = CliRunner().invoke(app, ["stop", "run", "--json", "--runs-dir", str(tmp_path)])
    answer = json.loads(done.stdout)
    assert (answer["state"], answer["said"]) == ("finished", "run run is not running")


def test_the_process_of_a_job_is_known_by_its_command_line_alone(tmp_path: Path) -> None:
    for number, words in enumerate(
        [
            ["python", "-m", ENTRY, "train-x", "0.1", "c"],
            ["python", "-m", ENTRY, "train-x-2", "0.1", "c"],
            ["bash", "-c", f"python -m {ENTRY} train-x 0.1 c"],
        ]
    ):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
    (tmp_path / "9").mkdir()
    assert processes_of("train-x", tmp_path) == [0]
    assert processes_of("train-y", tmp_path) == []


def test_a_job_does_not_keep_its_run_in_the_copy_of_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    for name in ("SPIKEFLEET_RUNS", "SPIKEFLEET_STORES"):
        monkeypatch.delenv(name, raising=False)
    for words in (["train", "digits"], ["data", "prepare", "digits"]):
        with pytest.raises(SystemExit, match="2"):
            refuse_place_in_copy(words, copy)
        assert "in the copy of that code, which Ray removes; set SPIKEFLEET_" in capsys.readouterr().out
        refuse_place_in_copy(words, tmp_path)
    refuse_place_in_copy(["train", "digits", "--runs-dir=/shared/runs"], copy)
    refuse_place_in_copy(["data", "prepare", "digits", "--out", "/shared/stores/x"], copy)
    monkeypatch.setenv("SPIKEFLEET_RUNS", "/shared/runs")
    refuse_place_in_copy(["train", "digits"], copy)
