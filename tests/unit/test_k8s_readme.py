"""The commands in k8s/README.md: parsed by the programs that they name, and run where no cluster is needed."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import spikefleet.cli
from support.manifests import FOLDERS, K8S, KUBECTL, Manifest, build, combined, containers_in, maps_in

TEXT = (K8S / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [block for language, block in FENCED.findall(TEXT) if not language]
INLINE: list[str] = re.findall(r"`([^`\n]+)`", FENCED.sub("", TEXT))
SUBCOMMANDS = {"helm": {"repo", "install"}, "docker": {"build", "push"}}
MINE = {"k8s/my-train": "train", "k8s/my-retrain": "retrain"}


def commands() -> list[str]:
    lines = [line for block in BLOCKS for line in block.splitlines()]
    return lines + [found for found in INLINE if re.match(r"(kubectl|spikefleet) ", found) and "..." not in found]


@functools.cache
def kubectl_options(subcommand: tuple[str, ...]) -> frozenset[str]:
    if KUBECTL is None:
        pytest.skip("kubectl is not installed")
    texts = [
        subprocess.run([KUBECTL, *words], capture_output=True, text=True, check=True).stdout
        for words in ((*subcommand, "--help"), ("options",))
    ]
    return frozenset(re.findall(r"(?<![\w-])(--?[a-z][\w-]*)(?==|,|:)", "\n".join(texts)))


def check_kubectl(words: list[str]) -> None:
    """Raises ValueError for a subcommand or an option that kubectl does not have, or a folder that is not there."""
    words = words[2:] if words[0] == "-n" else words
    subcommand: tuple[str, ...] = ("create", words[1]) if words[0] == "create" else (words[0],)
    subcommand += ("generic",) if subcommand[1:] == ("secret",) else ()
    own = words[: words.index("--")] if "--" in words else words
    known = kubectl_options(subcommand)
    if "--filename" not in known | {"--filename"} or len(known) < 20:
        raise ValueError(f"kubectl {' '.join(subcommand)} is no command")
    for word in own:
        name = word.partition("=")[0]
        if word.startswith("-") and name not in known:
            raise ValueError(f"kubectl {' '.join(subcommand)} has no option {name}")
    for option, value in itertools.pairwise(own):
        if option == "-k" and value not in MINE and value.removeprefix("k8s/") not in FOLDERS:
            raise ValueError(f"{value} is no folder")
        if option == "-f" and subcommand == ("apply",) and not (K8S.parent / value).is_file():
            raise ValueError(f"{value} is no file")
    if "--" in words:
        check(" ".join(shlex.quote(word) for word in words[words.index("--") + 1 :]))


def check(line: str) -> None:
    """Raises an error for a command that its program would refuse."""
    subprocess.run(["bash", "-n", "-c", line], check=True, capture_output=True)
    for inner in re.findall(r"\$\((kubectl .*)\)", line):
        check(inner)
    words = shlex.split(re.sub(r"\$\(.*\)", "X", line), comments=True)
    words = words[: words.index("|")] if "|" in words else words
    words = [word for word in words if word != "&"]
    if words[0] == "kubectl":
        check_kubectl(words[1:])
    elif words[0] == "spikefleet":
        group: Any = typer.main.get_command(spikefleet.cli.app)
        arguments = words[1:]
        while hasattr(group, "commands"):
            with group.make_context("spikefleet", list(arguments)) as context:
                _, group, arguments = group.resolve_command(context, list(arguments))
        if "MODEL" not in arguments:
            group.make_context("spikefleet", list(arguments))
    elif words[0] in SUBCOMMANDS:
        if words[1] not in SUBCOMMANDS[words[0]]:
            raise ValueError(f"{words[0]} {words[1]}")
    elif words[0].partition("=")[0] not in {"mkdir", "for", "printf", "set", "export", "HEAD"}:
        raise ValueError(f"{words[0]} is not expected")


@pytest.mark.parametrize("line", commands())
def test_commands_are_those_of_their_programs(line: str) -> None:
    check(line)


def test_there_are_commands_and_they_name_every_part_of_the_way() -> None:
    assert len(commands()) > 30
    for part in (
        "helm install",
        "docker build",
        "create secret",
        "apply -k k8s/my-train",
        "registry best",
        "retrain-now",
    ):
        assert any(part in line for line in commands()), part


@pytest.mark.parametrize(
    "line",
    [
        "kubectl apply -k k8s/trian",
        "kubectl apply -f k8s/base/nothing.yaml",
        "kubectl -n spikefleet get pods --selectors x",
        "kubectl applies -k k8s/train",
        'kubectl -n spikefleet exec "$HEAD" -- spikefleet registry bests --task classification',
        "spikefleet registry best --tasks classification --metric top1",
        "helm instal x",
        "kubectl get 'pods",
        "sudo rm -r /",
    ],
)
def test_wrong_commands_are_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r".+"):
        check(line)


@pytest.mark.parametrize(("folder", "within"), MINE.items())
def test_the_overlays_of_the_readme_build(folder: str, within: str, tmp_path: Path) -> None:
    (text,) = [block for language, block in FENCED.findall(TEXT) if language == "yaml"]
    written = yaml.safe_load(text.replace("../train", f"../{within}"))
    shutil.copytree(K8S, tmp_path / "k8s")
    where = tmp_path / folder
    where.mkdir()
    (where / "kustomization.yaml").write_text(yaml.safe_dump(written), encoding="utf-8")
    kinds = {document["kind"] for document in build(where)}
    assert {"Deployment", "StatefulSet", "CronJob" if within == "retrain" else "RayJob"} <= kinds


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What the README's commands make: the values of each Secret, which kubectl prints instead of sending it."""
    if KUBECTL is None:
        pytest.skip("kubectl is not installed")
    folder = tmp_path_factory.mktemp("secrets")
    (block,) = [block for block in BLOCKS if "mkdir -m 700 secrets" in block]
    lines = [line for line in block.splitlines() if not line.startswith("kubectl apply")]
    dry = [f"{line} --dry-run=client -o json" if "create secret" in line else line for line in lines]
    env = os.environ | {"PATH": f"{Path(KUBECTL).parent}:{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", "-euc", "\n".join(dry)], cwd=folder, env=env, check=True, capture_output=True, text=True
    )
    assert (folder / "secrets").stat().st_mode & 0o777 == 0o700
    decoder, found, rest = json.JSONDecoder(), {}, run.stdout.strip()
    while rest:
        secret, end = decoder.raw_decode(rest)
        found[secret["metadata"]["name"]] = {k: base64.b64decode(v).decode() for k, v in secret["data"].items()}
        rest = rest[end:].strip()
    return found


def wanted(documents: list[Manifest]) -> set[tuple[str, str]]:
    """Each Secret and key that a pod names."""
    found = set()
    for part in maps_in(documents):
        if "secretKeyRef" in part:
            found.add((part["secretKeyRef"]["name"], part["secretKeyRef"]["key"]))
        if "secretName" in part and "items" in part:
            found |= {(part["secretName"], item["key"]) for item in part["items"]}
    return found


def test_the_secrets_of_the_readme_have_what_the_pods_ask_for(
    secrets: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server.auth.config import read_auth_config

    documents = combined(("train", "mlflow"), ("components/tracking", "mlflow/postgres", "mlflow/s3"))
    there = {(name, key) for name, values in secrets.items() for key in values}
    assert wanted(documents) <= there
    assert wanted(documents) - (there - {("postgres", "password")}) == {("postgres", "password")}
    whole = {
        source["secretRef"]["name"]
        for container in containers_in(documents)
        for source in container.get("envFrom", [])
        if "secretRef" in source
    }
    assert whole == {"mlflow-s3", "spikefleet-tracking"} <= set(secrets)
    assert set(secrets["mlflow-s3"]) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL"}
    identity = json.loads(secrets["seaweedfs"]["s3.json"])["identities"][0]["credentials"][0]
    assert identity["secretKey"] == secrets["mlflow-s3"]["AWS_SECRET_ACCESS_KEY"] != ""
    (tmp_path / "auth.ini").write_text(secrets["mlflow-auth"]["auth.ini"], encoding="utf-8")
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(tmp_path / "auth.ini"))
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", secrets["mlflow-auth"]["admin-password"])
    auth = read_auth_config()
    assert auth.admin_password == secrets["spikefleet-tracking"]["MLFLOW_TRACKING_PASSWORD"]
    assert auth.database_uri == secrets["mlflow-database"]["uri"]
    assert f":{secrets['postgres']['password']}@postgres:5432/mlflow" in auth.database_uri
    assert len(secrets["postgres"]["password"]) == 48
