"""Speed and memory of one training step: SG ResNet18 against SpikingJelly's SEW ResNet18 and against the ANN twin.

    python tests/bench/bench_training_step.py [--quick] [--json FILE]

One step is forward, cross-entropy, backward and SGD with momentum on a CIFAR-stem ResNet18 with 10 classes, T = 4,
batch 16 (or --batch) at 32x32; the ANN twin runs batch 64 = T * B, the same dense work. Variants run interleaved in one
process, so that the load of a shared machine falls on all of them alike; medians, and the best steps, are printed as
ratios to the ANN. bf16 means autocast and channels_last. Peak memory is the resident set of a process of its own; saved
activations are what autograd holds between forward and backward. "bits" keeps spikes as bits (`train.spike_bits`),
"recompute" computes the first stage again in the backward pass (`train.recompute=1`). "own wgrad" computes the weight
gradients of convolutions in bf16 in the form for this CPU (`spikefleet_models.weight_gradients`) or in that of
SPIKEFLEET_WEIGHT_GRADIENTS; "/ ANN wgrad" is the ratio to the ANN with the same, if that runs too. "fused" has
SGD in one kernel (`optim.fused=true`).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T, BATCH, SIZE, CLASSES = 4, 16, 32, 10
ANN, ANN_WGRAD = "ann (batch 64)", "ann (batch 64), own wgrad"
PRECISIONS = ("fp32", "bf16")


def sg_resnet18(implementation: Literal["reference", "lean", "native"], **overrides: Any) -> nn.Module:
    from spikefleet_models.families import build_model, model_config
    from spikefleet_models.spiking_unit import use_implementation

    model = build_model(model_config("sg_resnet18", num_classes=CLASSES, timesteps=T, **overrides))
    use_implementation(model, implementation)
    return model


class SpikingJellySEWResNet18(nn.Module):
    """SpikingJelly's sew_resnet18 (ADD, IF, ATan, detached reset) with the CIFAR stem, as its users run it."""

    def __init__(self) -> None:
        super().__init__()
        from spikingjelly.activation_based import functional, layer, neuron, surrogate
        from spikingjelly.activation_based.model import sew_resnet

        self.net = sew_resnet.sew_resnet18(
            num_classes=CLASSES,
            cnf="ADD",
            spiking_neuron=neuron.IFNode,
            surrogate_function=surrogate.ATan(),
            detach_reset=True,
        )
        self.net.conv1 = layer.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.net.maxpool = nn.Identity()
        functional.set_step_mode(self.net, "m")
        self.reset_net = functional.reset_net

    def forward(self, images: Tensor) -> Tensor:
        self.reset_net(self.net)
        return self.net(images.unsqueeze(0).repeat(T, 1, 1, 1, 1)).mean(0)


class Variant(NamedTuple):
    """A network, and how its step is run."""

    build: Callable[[], nn.Module]
    times: int = 1
    """Its batch, in those of the others."""
    bits: bool = False
    recompute: int = 0
    own_wgrad: bool = False
    """Whether weight gradients are computed as `weight_gradients.chosen_form` says."""
    fused: bool = False
    """Whether the optimizer is one kernel."""


VARIANTS: dict[str, Variant] = {
    ANN: Variant(lambda: sg_resnet18("lean", connection="ann"), times=T),
    ANN_WGRAD: Variant(lambda: sg_resnet18("lean", connection="ann"), times=T, own_wgrad=True),
    "spikingjelly sew_resnet18": Variant(SpikingJellySEWResNet18),
    "sg_resnet18 reference": Variant(lambda: sg_resnet18("reference")),
    "sg_resnet18 lean": Variant(lambda: sg_resnet18("lean")),
    "sg_resnet18 lean, bits": Variant(lambda: sg_resnet18("lean"), bits=True),
    "sg_resnet18 lean, recompute": Variant(lambda: sg_resnet18("lean"), bits=True, recompute=1),
    "sg_resnet18 native": Variant(lambda: sg_resnet18("native")),
    "sg_resnet18 lean, own wgrad": Variant(lambda: sg_resnet18("lean"), own_wgrad=True),
    "sg_resnet18 native, own wgrad": Variant(lambda: sg_resnet18("native"), own_wgrad=True),
    "sg_resnet18 native, own wgrad, fused": Variant(lambda: sg_resnet18("native"), own_wgrad=True, fused=True),
    "sg_resnet18 native, bits": Variant(lambda: sg_resnet18("native"), bits=True),
    "sg_resnet18 native, recompute": Variant(lambda: sg_resnet18("native"), bits=True, recompute=1),
    "sg_resnet18 lean, literal": Variant(lambda: sg_resnet18("lean", gate_gradient="literal")),
    "bsg_star lean": Variant(lambda: sg_resnet18("lean", connection="bsg_star")),
    "bsg_star lean, literal": Variant(lambda: sg_resnet18("lean", connection="bsg_star", gate_gradient="literal")),
    "sg_resnet18 lean, rate": Variant(lambda: sg_resnet18("lean", decoder="rate")),
    "sew_resnet18 lean": Variant(lambda: sg_resnet18("lean", decoder="rate", connection="add")),
    "sew_resnet18 lean, bits": Variant(lambda: sg_resnet18("lean", decoder="rate", connection="add"), bits=True),
}


class Step:
    """A training step of one variant in one precision; bf16 means autocast and channels_last."""

    def __init__(self, variant: str, precision: str, batch: int = BATCH) -> None:
        from spikefleet_models.recomputation import recompute_stages
        from spikefleet_models.weight_gradients import chosen_form, use_weight_gradients

        chosen = VARIANTS[variant]
        torch.manual_seed(0)
        self.model = chosen.build()
        if chosen.recompute:
            recompute_stages(self.model, chosen.recompute)
        if chosen.own_wgrad:
            use_weight_gradients(self.model, chosen_form())
        self.images = torch.randn(batch * chosen.times, 3, SIZE, SIZE)
        self.targets = torch.randint(CLASSES, (batch * chosen.times,))
        self.bits = chosen.bits
        self.bf16 = precision == "bf16"
        if self.bf16:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.images = self.images.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, fused=chosen.fused or None)

    def loss(self, observe: Callable[[Tensor], None] | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16), self._saving(observe):
            return F.cross_entropy(self.model(self.images).float(), self.targets)

    def _saving(self, observe: Callable[[Tensor], None] | None) -> AbstractContextManager[None]:
        """How autograd saves tensors; each one that it keeps is shown to `observe`."""
        from spikefleet_models.packed_spikes import packed_spikes

        if self.bits:
            return packed_spikes(observe)
        if observe is None:
            return nullcontext()

        def keep(tensor: Tensor) -> Tensor:
            observe(tensor)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def saved_mib(self) -> float:
        """Distinct storages that autograd keeps for backward, parameters apart."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()

        loss = self.loss(count)
        total = sum(saved.values()) / 2**20
        del loss
        return total


def measure_times(
    variants: list[str], rounds: int, clock: Callable[[], float], batch: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every step after the first, by (variant, precision)."""
    steps = {(variant, precision): Step(variant, precision, batch) for variant in variants for precision in PRECISIONS}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for number in range(rounds + 1):
        for key, step in steps.items():
            start = clock()
            step()
            if number:  # the first round warms up
                seconds[key].append(clock() - start)
    return seconds


def measure_memory(variant: str, precision: str, batch: int) -> dict[str, float]:
    """In this process, which must be fresh: the resident set only ever rises."""
    step = Step(variant, precision, batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_mib": peak / 1024, "rise_mib": (peak - before) / 1024, "saved_mib": step.saved_mib()}


def measure_memory_apart(variant: str, precision: str, batch: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--batch", str(batch), "--memory-of", variant, precision]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds, no memory figures")
    parser.add_argument("--rounds", type=int, default=15, help="steps a variant")
    parser.add_argument("--batch", type=int, default=BATCH, help="samples; of the ANN T times as many")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch; default: its own choice"
    )
    parser.add_argument("--processor-time", action="store_true", help="not wall-clock time: for a loaded machine")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="these variants next to the ANN")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        variant, precision = arguments.memory_of
        print(json.dumps(measure_memory(variant, precision, arguments.batch)))
        return

    torch.set_num_threads(arguments.threads)
    variants = [name for name in VARIANTS if name == ANN or arguments.only is None or name in arguments.only]
    # Memory first: a child's ru_maxrss starts from what its parent had reached when it was forked.
    memory = {}
    if not arguments.quick:
        memory = {(v, p): measure_memory_apart(v, p, arguments.batch) for v in variants for p in PRECISIONS}
    clock = time.process_time if arguments.processor_time else time.perf_counter
    times = measure_times(variants, 3 if arguments.quick else arguments.rounds, clock, arguments.batch)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    twins = ("/ ANN wgrad",) if ANN_WGRAD in variants else ()
    columns = ("/ ANN fp32", "/ ANN same", "best/best", "median s", *twins, "saved MiB", "rise MiB", "peak MiB")
    print(f"{'variant':31}{'type':6}" + "".join(f"{column:>12}" for column in columns))
    for variant in variants:
        for precision in PRECISIONS:
            median = statistics.median(times[variant, precision])
            row = {
                "ratio_to_ann_fp32": median / statistics.median(times[ANN, "fp32"]),
                "ratio_to_ann_same_precision": median / statistics.median(times[ANN, precision]),
                "ratio_of_best_to_ann_same_precision": min(times[variant, precision]) / min(times[ANN, precision]),
                "median_seconds": median,
            }
            if ANN_WGRAD in variants:
                twin = statistics.median(times[ANN_WGRAD, precision])
                row["ratio_to_ann_same_precision_own_wgrad"] = median / twin
            line = f"{variant:31}{precision:6}" + "".join(f"{value:12.3f}" for value in row.values())
            if memory:
                used = memory[variant, precision]
                line += "".join(f"{used[key]:12.0f}" for key in ("saved_mib", "rise_mib", "peak_mib"))
                row.update(used)
            print(line, flush=True)
            figures.setdefault(variant, {})[precision] = row
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
