"""The image of the pods: its Dockerfile against the lock, the project and the manifests."""

import re
from pathlib import Path

from support.manifests import K8S, LOCKED, PROJECT, ROOT, cluster_spec


def test_dockerfile_installs_the_lock_for_the_pods_user() -> None:
    text = (K8S / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in text.splitlines() if not line.startswith("#")]
    syncs = [line for line in lines if "uv sync" in line]
    assert len(syncs) == 2
    assert all("--locked" in sync and "--no-dev" in sync for sync in syncs)
    assert "--no-build" in syncs[0]
    assert "--no-install-project" in syncs[0]
    assert "--no-editable" in syncs[1]
    assert f"ARG UV_VERSION={LOCKED['uv']}" in lines
    assert not [line for line in lines if line.startswith("FROM") and "${PYTHON_IMAGE}" not in line]
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
