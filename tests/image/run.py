"""Builds the image of `k8s/` and runs it as its pods would be: `make image`.

As root on Debian with debootstrap, buildah, podman, runc and iproute2. The steps:

    build       a base by debootstrap, and k8s/Dockerfile unchanged on it
    restricted  one container, with the security context of the manifest and no network: train, prove, register
    rayjob      head, workers and submitter of k8s/train, each on its own host, with KubeRay's command lines

It prints what each step found, and writes it to a JSON file.
"""

import argparse
import functools
import json
import re
import secrets
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from image import engine, pods
from image.engine import ImageError
from image.hosts import hosts, remove
from image.manifests import Job, ray_job
from image.pods import Place
from support.manifests import ROOT, built

SUBMISSION = "spikefleet-train-tried"
SERVICE = "spikefleet-train-head-svc.spikefleet.svc.cluster.local"
HEAD = "spikefleet-train-head"
TRAIN = "spikefleet train digits --workers 2"
_WAIT_S = 1200
_STATUS = re.compile(r"^(Uid|CapEff|NoNewPrivs|Seccomp):\s+(\S+)", re.MULTILINE)
_PROBE = "cat /proc/self/status; if touch /opt/spikefleet/written 2> /dev/null; then echo root is writable; fi"

Result = dict[str, object]


def build(arguments: argparse.Namespace) -> Result:
    """Build the image, and the base unless it is there."""
    begun = time.monotonic()
    if not engine.has_image(engine.BASE):
        engine.make_base(arguments.work / "base")
    engine.build(ROOT)
    size = json.loads(engine.tool("buildah", "inspect", "--type", "image", engine.IMAGE))
    return {"seconds": round(time.monotonic() - begun), "id": size["FromImageID"][:12]}


def restricted(arguments: argparse.Namespace) -> Result:
    """Train in one container without a network."""
    job = _job("127.0.0.1")
    claim = _empty(arguments.work / "restricted")
    name = "spikefleet-restricted"
    pods.remove([name])
    place = Place(name, "none", arguments.work / "pods", claim, {})
    settings = {**job.head.environment, "GLOO_SOCKET_IFNAME": "lo"}
    settings = {key: value for key, value in settings.items() if not key.startswith("RAY_")}
    settings["SPIKEFLEET_KERNELS"] = "native"
    begun = time.monotonic()
    command = ("/bin/bash", "-c", "--", f"{_PROBE}; {TRAIN}")
    container = replace(job.head, environment=settings, command=command)
    try:
        pods.start(container, place)
        _wait("the training", lambda: not pods.is_running(name), name)
        printed = pods.logs(name, 10_000)
    finally:
        pods.remove([name])
    facts: Result = dict(_STATUS.findall(printed))
    expected = {"Uid": "1000", "CapEff": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
    if any(facts.get(key) != value for key, value in expected.items()) or "root is writable" in printed:
        raise ImageError(f"the container is not restricted: {facts}, expected {expected} and a read-only root")
    found = _trained(claim, printed)
    (environment,) = claim.glob("runs/*/tracking-artifacts/*/environment.json")
    kernels = json.loads(environment.read_text())["kernels"]
    if "native" not in kernels:
        raise ImageError(f"the training ran in another form than native: {kernels}")
    return {**facts, **found, "kernels": kernels, "seconds": round(time.monotonic() - begun)}


def rayjob(arguments: argparse.Namespace) -> Result:
    """Run the RayJob of `k8s/train`: head, workers and submitter in containers on hosts of their own."""
    workers = [f"spikefleet-train-worker-{number}" for number in range(2)]
    submitter = "spikefleet-train-submitter"
    names = [HEAD, *workers, submitter]
    claim = _empty(arguments.work / "claim")
    pods.remove([*names, *(f"{name}-wait" for name in workers)])
    begun = time.monotonic()
    with hosts(names) as addresses:
        known = {SERVICE: addresses[HEAD], **addresses}
        job = _job(addresses[HEAD])

        def place(name: str) -> Place:
            return Place(name, f"ns:/run/netns/{name}", arguments.work / "pods", claim, known)

        try:
            pods.start(job.head, place(HEAD))
            token = job.head.environment["RAY_AUTH_TOKEN"]
            _wait("the head", lambda: _healthy(f"{addresses[HEAD]}:8265/api/gcs_healthz", token), HEAD, [HEAD])
            for name in workers:
                pods.run(job.worker_start, replace(place(name), name=f"{name}-wait", network=f"ns:/run/netns/{name}"))
                pods.start(job.worker, place(name))
            # The operator makes the submitter when all pods are ready.
            for name in workers:
                ready = f"{addresses[name]}:52365/api/healthz"
                _wait(name, functools.partial(_healthy, ready, token), name, [HEAD, *workers])
            ready_s = time.monotonic() - begun
            pods.start(job.submitter, place(submitter))
            _wait("the job", lambda: not pods.is_running(submitter), submitter, [HEAD, *workers])
            printed = pods.logs(submitter, 10_000)
            status = pods.inside(HEAD, "ray", "job", "status", "--address", "http://127.0.0.1:8265", SUBMISSION)
            if "succeeded" not in status:
                raise ImageError(f"the job did not succeed:\n{status[-1000:]}\n{printed[-2000:]}")
        finally:
            for name in reversed(names):
                pods.stop(name)
            remove(names)
    found = _trained(claim, printed)
    return {**found, "ready_seconds": round(ready_s), "seconds": round(time.monotonic() - begun)}


def _job(address: str) -> Job:
    return ray_job(built("train"), SERVICE, address, SUBMISSION, secrets.token_hex(16))


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder.chmod(0o2777)  # what fsGroup does to a claim
    return folder


def _healthy(probe: str, token: str) -> bool:
    """Answer of a probe of the kubelet, to which the bridge leads."""
    request = urllib.request.Request(f"http://{probe}", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _wait(what: str, done: Callable[[], bool], name: str, needed: Sequence[str] = ()) -> None:
    """Wait for something.

    Args:
        what: is waited for, for messages.
        done: whether it is there.
        name: of the container whose logs tell why it is not.
        needed: containers that have to run meanwhile.

    Raises:
        ImageError: such a container ended, or it took too long.
    """
    until = time.monotonic() + _WAIT_S
    while not done():
        for other in needed:
            if not pods.is_running(other):
                raise ImageError(f"{other} ended while {what} was waited for:\n{pods.logs(other)}")
        if time.monotonic() > until:
            raise ImageError(f"{what} took over {_WAIT_S} s:\n{pods.logs(name)}")
        time.sleep(2)


def _trained(claim: Path, printed: str) -> Result:
    """Accuracy of the run in a claim, which must be complete and registered as champion."""
    reports = sorted(claim.glob("runs/*/report/evaluation.json"))
    if len(reports) != 1 or "champion" not in printed:
        raise ImageError(f"{len(reports)} complete runs in {claim}, expected 1 and a champion:\n{printed[-3000:]}")
    top1 = json.loads(reports[0].read_text())["metrics"]["top1"]
    return {"top1": round(top1, 4)}


STEPS = {"build": build, "restricted": restricted, "rayjob": rayjob}


def main() -> int:
    """Run the steps; 1 if one fails, 2 if this machine cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "spikefleet-image")
    parser.add_argument("--out", type=Path, default=ROOT / "out/image.json")
    arguments = parser.parse_args()
    if missing := engine.missing_tools():
        print(f"not installed: {', '.join(missing)}; on Debian: apt-get install {' '.join(engine.NEEDED)} iproute2")
        return 2
    arguments.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    for name in arguments.only:
        print(f"{name}: {STEPS[name].__doc__}", flush=True)
        try:
            results[name] = STEPS[name](arguments)
        except ImageError as error:
            print(f"{name}: {error}")
            return 1
        print(f"{name}: {results[name]}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
