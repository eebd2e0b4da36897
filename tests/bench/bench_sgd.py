"""SGD with momentum and weight decay in one kernel (`optim.fused=true`) against torch's default, on the CPU.

    python tests/bench/bench_sgd.py [--rounds N] [--threads N] [--processor-time]

The parameters are those of SG ResNet18 for CIFAR, 11.2 million; the two run in turn, and medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from spikefleet_models.families import build_model, model_config


def optimizer(fused: bool) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    parameters = list(build_model(model_config("sg_resnet18", num_classes=10)).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    settings = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
    return torch.optim.SGD(parameters, fused=fused or None, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor-time", action="store_true", help="for a machine that others use")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    clock = time.process_time if chosen.processor_time else time.perf_counter
    optimizers = {"torch's default": optimizer(fused=False), "fused": optimizer(fused=True)}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(chosen.rounds + 1):
        for name, one in optimizers.items():
            start = clock()
            one.step()
            if number:  # the first round makes the momentum
                seconds[name].append(clock() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, median in medians.items():
        print(f"{name:16} {1000 * median:7.2f} ms, best {1000 * min(seconds[name]):.2f}")
    for what, figures in (("medians", medians), ("best", {name: min(each) for name, each in seconds.items()})):
        default, fused = figures.values()
        print(f"fused / default, {what}: {fused / default:.2f}")


if __name__ == "__main__":
    main()
