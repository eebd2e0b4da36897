"""The image of the pods: its Dockerfile against the lock, the project and the manifests, without building it."""

from __future__ import annotations

import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from support.manifests import K8S, LOCKED, PROJECT, ROOT, cluster_spec, manifest

UV = shutil.which("uv", path=sysconfig.get_path("scripts")) or "uv"


def instructions() -> list[str]:
    """The Dockerfile without comments, an instruction a line."""
    text = (K8S / "Dockerfile").read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [line.strip() for line in "\n".join(kept).replace("\\\n", " ").splitlines() if line.strip()]


def test_dockerfile_installs_the_lock_for_the_pods_user() -> None:
    lines = instructions()
    syncs = [sync for line in lines for sync in re.findall(r"uv sync [^;]*", line)]
    assert len(syncs) == 2
    assert all("--locked" in sync and "--no-dev" in sync and "--extra server" in sync for sync in syncs)
    assert "--no-build" in syncs[0]
    assert "--no-install-project" in syncs[0]
    assert "--no-editable" in syncs[1]
    assert f"ARG UV_VERSION={LOCKED['uv']}" in lines
    copied = {Path(name) for line in lines if re.match(r"COPY (?!--from)", line) for name in line.split()[1:-1]}
    assert all((ROOT / path).exists() for path in copied)
    assert {Path(name).parts[0] for name in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]} <= {
        path.name for path in copied
    }
    sent = {line[1:] for line in (K8S / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == {str(path) for path in copied}
    user = next(line.split()[1] for line in reversed(lines) if line.startswith("USER"))
    context = cluster_spec("base")["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    for kind in ("Deployment", "CronJob"):
        spec = manifest("mlflow" if kind == "Deployment" else "retrain", kind)["spec"]
        pod = spec.get("jobTemplate", {}).get("spec", spec)["template"]["spec"]
        assert user == f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"


def stages(lines: list[str]) -> list[str]:
    """What each FROM says; refused if it is anything but the base of the build arguments."""
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    for base in bases:
        if base != "${PYTHON_IMAGE}${PYTHON_DIGEST:+@${PYTHON_DIGEST}}":
            raise ValueError(f"FROM {base} is not the base of the build arguments")
    return bases


def test_both_stages_have_the_base_of_the_build_arguments_and_its_digest() -> None:
    lines = instructions()
    assert len(stages(lines)) == 2
    before = lines[: next(i for i, line in enumerate(lines) if line.startswith("FROM"))]
    assert [line.partition("=")[0] for line in before] == ["ARG PYTHON_IMAGE", "ARG PYTHON_DIGEST"]
    # No digest was made up.
    assert before[1] == "ARG PYTHON_DIGEST="
    assert not re.search(r"sha256:[0-9a-f]{8}", (K8S / "Dockerfile").read_text(encoding="utf-8"))
    for literal in ("FROM python:3.11", "FROM ${PYTHON_IMAGE}", "FROM python@sha256:" + "0" * 64):
        with pytest.raises(ValueError, match="is not the base of the build arguments"):
            stages([*lines, literal])
    # Only the environment goes from one stage to the other: neither uv nor its cache.
    last = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
    assert [line for line in last if line.startswith("COPY")] == ["COPY --from=build /opt/spikefleet /opt/spikefleet"]


def test_pods_have_the_compiler_of_the_native_unit() -> None:
    lines = instructions()
    last = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
    installed = [i for i, line in enumerate(last) if re.search(r"apt-get install .*\bg\+\+", line)]
    assert len(installed) == 1
    assert installed[0] < next(i for i, line in enumerate(last) if line.startswith("USER"))


def test_shell_of_the_dockerfile_parses() -> None:
    scripts = [re.sub(r"^RUN (--mount=\S+ )?", "", line) for line in instructions() if re.match(r"RUN (?!\[)", line)]
    assert len(scripts) == 6
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)
    assert subprocess.run(["bash", "-n", "-c", scripts[1] + "; fi"], check=False, capture_output=True).returncode != 0


def test_torch_of_another_index_has_the_lock_s_versions_and_no_cuda(tmp_path: Path) -> None:
    """The part of the Dockerfile that chooses what comes from where, run on the real lock."""
    (script,) = [line for line in instructions() if "TORCH_INDEX" in line and "export=" in line]
    script = " ".join(script.split())
    chosen = script[script.index("export=") : script.index("&& uv venv")].replace("/tmp/", f"{tmp_path}/")
    run = ["bash", "-euc", chosen]
    env = os.environ | {"PATH": f"{Path(UV).parent}:{os.environ['PATH']}", "UV_OFFLINE": "1"}
    env.pop("UV_PROJECT_ENVIRONMENT", None)
    subprocess.run(run, cwd=ROOT, env=env, check=True, capture_output=True)
    torch = (tmp_path / "torch.txt").read_text().splitlines()
    assert torch == [f"{name}=={LOCKED[name]}" for name in ("torch", "torchaudio", "torchvision")]
    rest = (tmp_path / "rest.txt").read_text()
    names = set(re.findall(r"^([a-z0-9-]+)(?:\[\S+\])?==", rest, re.MULTILINE))
    assert {"ray", "mlflow", "boto3", "psycopg", "filelock"} <= names
    assert not {name for name in names if re.match(r"nvidia-|cuda-|triton|torch", name)}
    assert any(name.startswith("nvidia-") for name in LOCKED)
    assert rest.count("--hash=") > len(names)


def flags(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[4:8], "little")


def environment() -> dict[str, str]:
    """What the build stage sets for uv's bytecode."""
    (line,) = [line for line in instructions() if line.startswith("ENV UV_PROJECT_ENVIRONMENT")]
    set_there = dict(word.split("=", 1) for word in line.split()[1:])
    names = ("UV_COMPILE_BYTECODE", "PYC_INVALIDATION_MODE", "PYTHONDONTWRITEBYTECODE")
    return {name: set_there[name] for name in names}


@pytest.mark.parametrize("as_the_image", [True, False])
def test_uv_writes_bytecode_that_no_time_can_spoil(as_the_image: bool, tmp_path: Path) -> None:
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "X = 1\n")
        archive.writestr("tiny-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
        archive.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.dist-info/RECORD", "")
    target = tmp_path / "target"
    given = environment() if as_the_image else {"UV_COMPILE_BYTECODE": "1"}
    env = (
        {k: v for k, v in os.environ.items() if k not in environment()} | given | {"UV_CACHE_DIR": str(tmp_path / "c")}
    )
    install = [UV, "pip", "install", "--offline", "--no-index", "--python", sys.executable, "--target", str(target)]
    subprocess.run([*install, str(wheel)], env=env, check=True, capture_output=True)
    (written,) = target.rglob("*.pyc")
    assert flags(written) == (1 if as_the_image else 0)


def test_the_build_ends_where_bytecode_is_checked_by_time(tmp_path: Path) -> None:
    (line,) = [line for line in instructions() if line.startswith('RUN ["/opt/spikefleet/bin/python"')]
    _, option, script = json.loads(line.removeprefix("RUN "))
    command = [sys.executable, "-S", option, script.replace("/opt/spikefleet", str(tmp_path))]
    source = tmp_path / "a.py"
    source.write_text("X = 1\n", encoding="utf-8")
    py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    failed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("1 files of bytecode are checked by time")
