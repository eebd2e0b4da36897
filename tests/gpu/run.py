"""Everything that a GPU should be asked, in one run of under four minutes, on a bare machine.

    PYTHONPATH=models:pipelines:platform:tune:tests python -m gpu.run --out FILE [--fashion-mnist DIR] [--minutes 3.9]

Needs torch, Triton, NumPy, scikit-learn, safetensors, PyYAML, pydantic, SpikingJelly and loguru; h5py and torchvision
where they are there; export CUBLAS_WORKSPACE_CONFIG=:4096:8 for the deterministic trainings. Each section has a budget,
and its failure is recorded and ends no other; the file is written after each. All sections take some seven minutes; in
less, the later ones are left out, but for the training. `--dry` runs all of it on the CPU, at small sizes, in the form
for the CPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from gpu import network_checks, timing
from gpu.fashion import fashion_mnist
from gpu.guarantees import guarantees
from gpu.profile_step import profile_step
from gpu.session import Results, Session
from spikefleet_models.kernels import unit_form

_FOR_TRAINING = 75.0
"""Seconds that are kept for the training at the end."""


def machine(session: Session, results: Results) -> None:
    """Card and versions."""
    results |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "unit form": unit_form(session.device),
    }
    try:
        import triton

        results["triton"] = triton.__version__
    except ImportError:
        results["triton"] = None
    if not session.dry:
        properties = torch.cuda.get_device_properties(0)
        results |= {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
        }
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        results["driver, clock, power"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Run all sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--fashion-mnist", type=Path, help="directory of the four IDX files; without it, no training")
    parser.add_argument("--minutes", type=float, default=3.9, help="for everything")
    parser.add_argument("--train-minutes", type=float, help="of the Fashion-MNIST training; default: what is left")
    parser.add_argument("--only", nargs="+", help="these sections")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at small sizes")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; use --dry to try the script on the CPU")
    session = Session(arguments.out, arguments.minutes * 60, arguments.dry)
    session.results["started"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    session.results["dry"] = arguments.dry
    torch.backends.cudnn.benchmark_limit = 4  # trying all algorithms takes 8 s for each layout and batch
    sections = [
        ("machine", 20.0, machine),
        ("prepare", 45.0, network_checks.prepare),
        ("r18_cifar_b256", 45.0, timing.classifier_steps("r18_cifar_b256", start_within=30)),
        ("r34_imagenet_b64", 30.0, timing.classifier_steps("r34_imagenet_b64", start_within=20)),
        ("guarantees", 20.0, guarantees),
        ("trainings", 25.0, network_checks.trainings),
        ("spike_yolo_s_640_b16", 25.0, timing.detector_steps),
        # With more minutes:
        ("profile", 20.0, profile_step),
        ("networks", 30.0, network_checks.networks),
        ("unit_times", 20.0, timing.unit_times),
        ("r18_cifar_b32", 25.0, timing.classifier_steps("r18_cifar_b32", start_within=15)),
        ("tile_sizes", 60.0, timing.tile_sizes),
    ]
    if arguments.fashion_mnist is not None:
        sections.append(("fashion_mnist", 600.0, fashion_mnist(arguments.fashion_mnist, arguments.train_minutes)))
    chosen = [section for section in sections if arguments.only is None or section[0] in arguments.only]
    reserve = _FOR_TRAINING if chosen and chosen[-1][0] == "fashion_mnist" else 0.0
    for name, budget, work in chosen:
        session.section(name, budget, work, 0.0 if name == "fashion_mnist" else reserve)


if __name__ == "__main__":
    main()
