"""Whole networks and trainings on a device: the forms against one another, and the device against the CPU."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from gpu import unit_checks, warm
from gpu.memory_store import as_store
from gpu.session import Results, Session
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import train
from spikefleet_models.families import build_model, model_config
from spikefleet_models.spiking_unit import use_implementation
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions

CONNECTIONS = ("bsg", "bsg_star", "add", "and", "iand", "post_add")


def units(session: Session, results: Results, processes: int = 14) -> None:
    """Every form of the unit, in many processes, since Triton compiles in Python."""
    device = session.device
    results["rounding"] = unit_checks.rounding(device)
    cases = unit_checks.all_cases()
    if session.dry:
        cases = [case for case in cases if case.size != "large"][:: len(cases) // 12]
    pool = 2 if session.dry else max(1, min(processes, (os.cpu_count() or 2) - 2))
    shares = [cases[start::pool] for start in range(pool)]
    results["cases"], results["passed"], results["failed"] = len(cases), 0, []
    results["worst"] = {}

    def run(share: list[unit_checks.Case]) -> None:
        request = {"device": device.type, "fused": session.fused, "cases": [case._asdict() for case in share]}
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu.unit_checks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        for line in process.stdout:
            found: dict[str, Any] = json.loads(line)
            if found["problems"]:
                results["failed"].append(found)
            else:
                results["passed"] += 1
            for form in ("lean", session.fused):
                worst = found.get(form, {}).get("worst", 0.0)
                key = f"{form} {found['case']['dtype']}"
                results["worst"][key] = max(results["worst"].get(key, 0.0), worst)
        if process.wait() != 0:
            results["failed"].append({"process": process.returncode})

    running: list[subprocess.Popen[str]] = []
    threads = ThreadPoolExecutor(pool)
    try:
        list(threads.map(run, shares))
    finally:
        for process in running:
            process.kill()
        threads.shutdown()


def networks(session: Session, results: Results) -> None:
    """Logits, loss and gradients of every connection: fused, lean and reference form; deterministic convolutions."""
    device = session.device
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    for connection in CONNECTIONS[:2] if session.dry else CONNECTIONS:
        for name, layout in unit_checks.LAYOUTS.items():
            torch.manual_seed(0)
            config = model_config("sg_resnet18", connection=connection, width=0.25 if session.dry else 0.5)
            reference = build_model(config).to(device).to(memory_format=layout)
            images = torch.randn(8, 3, 32, 32, device=device).contiguous(memory_format=layout)
            targets = torch.arange(8, device=device)
            rows: dict[str, Any] = {}
            gradients: dict[str, torch.Tensor] = {}
            logits: dict[str, torch.Tensor] = {}
            for form in ("reference", "lean", session.fused):
                network = copy.deepcopy(reference)
                use_implementation(network, form)  # type: ignore[arg-type]
                logits[form] = network(images)
                loss = F.cross_entropy(logits[form], targets)
                loss.backward()
                gradients[form] = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
                rows[form] = {
                    "loss": loss.item(),
                    "logits_equal": torch.equal(logits[form], logits["reference"]),
                    "gradient_error": float(
                        (gradients[form] - gradients["reference"]).norm() / gradients["reference"].norm()
                    ),
                }
            results[f"{connection} {name}"] = rows
    torch.backends.cudnn.deterministic = False


def _digits(device: torch.device, epochs: int, *settings: str) -> dict[str, Any]:
    gpu = f"cluster.gpu={str(device.type == 'cuda').lower()}"
    overrides = [f"train.epochs={epochs}", "cluster.workers=0", gpu, *settings]
    config = load_config("digits", parse_overrides(overrides))
    store = as_store("digits", read_digits(None, DigitsOptions(), 0))
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(config, store, Path(folder), ProcessGroup(0, 1, device), NullSink())
        weights = (Path(outcome.best_checkpoint) / "model.safetensors").read_bytes()
    torch.use_deterministic_algorithms(False)
    return {
        "losses": [row["train/loss"] for row in outcome.history],
        "top1": outcome.test["top1"],
        "seconds": time.perf_counter() - begun,
        "weights": weights,
    }


def prepare(session: Session, results: Results) -> None:
    """Units, while other processes compile what later sections would compile alone: SpikingJelly's best takes 20 s."""
    compiling: dict[str, subprocess.Popen[str]] = {}
    if not session.dry:
        for name in warm.names():
            command = [sys.executable, "-m", "gpu.warm", name]
            compiling[name] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    begun = time.monotonic()
    try:
        results["units"] = {}
        units(session, results["units"], processes=10)
        session.write()
        for name, process in compiling.items():
            _, said = process.communicate()
            results[name] = round(time.monotonic() - begun, 1) if process.returncode == 0 else said[-600:]
    finally:
        for process in compiling.values():
            process.kill()


def trainings(session: Session, results: Results) -> None:
    """Digits on the device: twice in deterministic mode, bf16, with a CUDA graph, fp16; losses beside the CPU's."""
    device, epochs = session.device, 1 if session.dry else 2
    runs = {
        "deterministic": ["train.deterministic=true"],
        "deterministic again": ["train.deterministic=true"],
        "bf16": ["train.precision=bf16", "train.channels_last=true"],
        "bf16, graph": ["train.precision=bf16", "train.channels_last=true", "train.cuda_graphs=true"],
        "fp16": ["train.precision=fp16", "train.channels_last=true"],
    }
    if session.dry:
        runs = {name: run for name, run in runs.items() if name.startswith("deterministic")}
    on_cpu = _digits(torch.device("cpu"), epochs)
    results["cpu"] = {key: value for key, value in on_cpu.items() if key != "weights"}
    found: dict[str, dict[str, Any]] = {}
    for name, settings in runs.items():
        found[name] = _digits(device, epochs, *settings)
        results[name] = {key: value for key, value in found[name].items() if key != "weights"}
        results[name]["largest relative difference of losses to the CPU"] = max(
            abs(a - b) / b for a, b in zip(found[name]["losses"], on_cpu["losses"], strict=True)
        )
    first, again = found["deterministic"], found["deterministic again"]
    results["same weights twice"] = first["weights"] == again["weights"] and first["losses"] == again["losses"]
