"""Speed of the spiking units alone, native against lean: the units of SG ResNet18 (CIFAR stem), and the `digits` step;
the I-LIF layers of SpikeYOLO s.

    python tests/bench/bench_units.py [--rounds 15] [--threads 1] [--wall] [--only ilif]

Each unit of the network (batch norm, IF, BSG; T = 4, batch 16, 32x32) runs forward and backward alone on drawn
tensors; so do each I-LIF layer of SpikeYOLO s (D = 4, batch 2, 320x320, channels_last) at T = 1 and T = 4, and each
unit of SG ResNet18 with I-LIF and ADD; and SpikeYOLO s as a whole (T = 1). Forms run interleaved, so that the load of a
shared machine falls on all alike. Times are processor times of the process, which other processes disturb least, and
with one thread comparable to wall time; `--wall` measures wall-clock time instead. Medians over the rounds, and the
best rounds, are printed as ratios to lean.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikefleet.training.malloc import keep_freed_memory
from spikefleet_models.families import build_model, model_config
from spikefleet_models.kernels import Implementation, unit_form
from spikefleet_models.neurons import ILIF, spiking_nodes
from spikefleet_models.spiking_unit import SpikingUnit, use_implementation

T, BATCH, SIDE = 4, 16, 32
FORMS: tuple[Implementation, ...] = ("lean", "native")


class Call(NamedTuple):
    """One call of a unit in the network: its shapes, and whether z is static."""

    unit: SpikingUnit
    z: Tensor
    shortcut: Tensor | None
    repeat: bool


def recorded_calls(bf16: bool, **settings: Any) -> list[Call]:
    """Each unit of the network with tensors of the shapes, layout and type that it gets there."""
    network = build_model(model_config("sg_resnet18", num_classes=10, timesteps=T, **settings))
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    if bf16:
        network, images = (
            network.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    calls: list[Call] = []
    forward = SpikingUnit._forward

    def record(self: SpikingUnit, z: Tensor, shortcut: Tensor | None, timesteps: int, repeat: bool) -> Tensor:
        joined = None if shortcut is None else shortcut.detach().clone().requires_grad_()
        calls.append(Call(copy.deepcopy(self), z.detach().clone().requires_grad_(), joined, repeat))
        return forward(self, z, shortcut, timesteps, repeat)

    SpikingUnit._forward = record  # type: ignore[method-assign]
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            network(images)
    finally:
        SpikingUnit._forward = forward  # type: ignore[method-assign]
    return calls


def run_units(calls: list[Call], gradients: list[Tensor]) -> None:
    for call, gradient in zip(calls, gradients, strict=True):
        unit = call.unit
        spikes = unit.repeat_over_time(call.z) if call.repeat else unit(call.z, call.shortcut)
        spikes.backward(gradient)
        call.z.grad = None
        if call.shortcut is not None:
            call.shortcut.grad = None
        unit.zero_grad(set_to_none=True)


def units(bf16: bool, **settings: Any) -> dict[str, Callable[[], None]]:
    calls = recorded_calls(bf16, **settings)
    with torch.no_grad():
        gradients = [
            torch.randn_like(c.unit.repeat_over_time(c.z) if c.repeat else c.unit(c.z, c.shortcut)) for c in calls
        ]

    def of(form: Implementation) -> Callable[[], None]:
        def run() -> None:
            for call in calls:
                use_implementation(call.unit, form)
            run_units(calls, gradients)

        return run

    return {form: of(form) for form in FORMS}


def integer_layers(timesteps: int) -> dict[str, Callable[[], None]]:
    """The I-LIF layers of SpikeYOLO s, each on currents of the shape that it gets there."""
    network = build_model(model_config("spike_yolo_s", timesteps=timesteps)).to(memory_format=torch.channels_last)
    calls: list[tuple[ILIF, Tensor, Tensor]] = []

    def record(node: nn.Module, arguments: tuple[Tensor, ...], emitted: Tensor) -> None:
        assert isinstance(node, ILIF)
        calls.append((copy.deepcopy(node), arguments[0].detach().clone().requires_grad_(), torch.randn_like(emitted)))

    hooks = [node.register_forward_hook(record) for node in spiking_nodes(network).values()]
    with torch.no_grad():
        network(torch.randn(2, 3, 320, 320).contiguous(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    for node, _, _ in calls:
        node._forward_hooks.clear()

    def of(form: Implementation) -> Callable[[], None]:
        def run() -> None:
            for node, currents, gradient in calls:
                node.implementation = form
                node(currents).backward(gradient)
                currents.grad = None

        return run

    return {form: of(form) for form in FORMS}


def detector() -> dict[str, Callable[[], None]]:
    """Forward and backward pass of the whole SpikeYOLO s, without loss and optimizer."""
    images = torch.randn(2, 3, 320, 320).contiguous(memory_format=torch.channels_last)
    network = build_model(model_config("spike_yolo_s", timesteps=1)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        gradients = [torch.randn_like(level) for level in network(images)]

    def of(form: Implementation) -> Callable[[], None]:
        def run() -> None:
            use_implementation(network, form)
            network.zero_grad(set_to_none=True)
            torch.autograd.backward(network(images), gradients)

        return run

    return {form: of(form) for form in FORMS}


def digits() -> dict[str, Callable[[], None]]:
    """The step of the recipe `digits` on one of its two workers: forward, loss, backward, SGD at batch 32."""
    from spikefleet.config.recipes import load_config

    config = load_config("digits")
    torch.manual_seed(0)
    images, targets = torch.rand(32, 1, 8, 8), torch.randint(10, (32,))

    def of(form: Implementation) -> Callable[[], None]:
        network = build_model(config.model)
        use_implementation(network, form)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(network(images), targets).backward()
            optimizer.step()

        return step

    return {form: of(form) for form in FORMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="measure what has this in its name")
    parser.add_argument("--wall", action="store_true", help="wall-clock time: for a quiet machine")
    arguments = parser.parse_args()
    keep_freed_memory()  # as in training
    torch.set_num_threads(arguments.threads)
    os.environ["SPIKEFLEET_KERNELS"] = "native"
    if (form := unit_form(torch.device("cpu"))) != "native":
        raise SystemExit(f"nothing to compare: {form}")
    clock = time.perf_counter if arguments.wall else time.process_time
    integers = {"neuron": {"kind": "ilif"}, "connection": "add"}
    choices = {
        "units fp32 NCHW": lambda: units(False),
        "units bf16 NHWC": lambda: units(True),
        "digits step": digits,
        "ilif T=1": lambda: integer_layers(1),
        "ilif T=4": lambda: integer_layers(4),
        "ilif units fp32": lambda: units(False, **integers),
        "yolo": detector,
    }
    measured = {name: build() for name, build in choices.items() if arguments.only in name}
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(arguments.rounds + 1):
        for name, forms in measured.items():
            for form, run in forms.items():
                start = clock()
                run()
                if number:  # the first round warms up
                    seconds.setdefault((name, form), []).append(clock() - start)
    print(f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}; milliseconds; ratios native / lean")
    print(f"{'':18}{'lean':>10}{'native':>10}{'ratio':>10}{'best/best':>10}")
    for name in measured:
        lean, native = seconds[name, "lean"], seconds[name, "native"]
        ratio = statistics.median(native) / statistics.median(lean)
        shown = (statistics.median(lean) * 1e3, statistics.median(native) * 1e3)
        print(f"{name:18}{shown[0]:10.1f}{shown[1]:10.1f}{ratio:10.3f}{min(native) / min(lean):10.3f}")
    print(json.dumps({f"{name}, {form}": statistics.median(values) for (name, form), values in seconds.items()}))


if __name__ == "__main__":
    main()
