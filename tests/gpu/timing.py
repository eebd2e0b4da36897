"""Interleaved timings: medians of steps, of units alone and of tile sizes, and peak memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from gpu.session import Results, Session
from gpu.steps import DRY, SETUPS, GraphedStep, Variants, classifiers, detector, has_torchvision
from gpu.unit_checks import build_unit
from spikefleet_models.spiking_unit import use_implementation


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Duration of one call, on the device's own clock."""
    if device.type != "cuda":
        begun = time.perf_counter()
        work()
        return (time.perf_counter() - begun) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_mib(step: Callable[[], None], device: torch.device) -> float | None:
    """Memory that a step needs beyond what exists between steps."""
    if device.type != "cuda" or isinstance(step, GraphedStep):  # a graph has its memory for good
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def interleaved(
    variants: Variants, device: torch.device, warm_up: int, rounds: int, results: Results, start_within: float
) -> None:
    """Medians of `rounds` rounds, one step of each variant in each; a variant that fails is recorded and left out.

    No further variant starts after `start_within` seconds, and those that did are measured.
    """
    steps: dict[str, Callable[[], None]] = {}
    whole = time.perf_counter()
    for name, build in variants.items():
        begun = time.perf_counter()
        if begun - whole > start_within:
            results[name] = {"skipped": "no time was left to start it"}
            continue
        try:
            step = build()
            for _ in range(warm_up):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            results[name] = {"start_s": round(time.perf_counter() - begun, 2), "peak_mib": peak_mib(step, device)}
            steps[name] = step
        except Exception as error:
            results[name] = {"failure": f"{type(error).__name__}: {error}"[:800]}
            gc.collect()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            times[name].append(milliseconds(step, device))
        if number >= 4:
            for name, measured in times.items():
                results[name] |= {
                    "median_ms": round(statistics.median(measured), 3),
                    "best_ms": round(min(measured), 3),
                    "rounds": len(measured),
                }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def classifier_steps(name: str, start_within: float) -> Callable[[Session, Results], None]:
    """The section of a setup."""

    def work(session: Session, results: Results) -> None:
        device = session.device
        torch.backends.cudnn.benchmark = True
        setup = DRY if session.dry else SETUPS[name]
        variants = classifiers(name, setup, device, session.fused)
        interleaved(variants, device, *((1, 5) if session.dry else (3, 21)), results, start_within)
        _free()

    return work


def detector_steps(session: Session, results: Results) -> None:
    """SpikeYOLO s at 640 and its ANN twin, in bf16 and channels_last."""
    device = session.device
    torch.backends.cudnn.benchmark = True
    size: dict[str, Any] = {"batch": 1, "side": 64} if session.dry else {"batch": 16, "side": 640}
    kind = "tiny" if session.dry else "s"
    results["criterion"] = "its own" if has_torchvision() else "mean square of the outputs: torchvision is missing"
    variants: Variants = {
        "spike_yolo bf16 (T=1, D=4)": lambda: detector(f"spike_yolo_{kind}", device, **size),
        "ann bf16": lambda: detector(f"spike_yolo_ann_{kind}", device, **size),
    }
    interleaved(variants, device, *((1, 5) if session.dry else (3, 15)), results, 1000.0)
    _free()


def unit_times(session: Session, results: Results) -> None:
    """Forward and backward of single units at the sizes of SG ResNet18 with 256 images, in both layouts and types."""
    device, fused = session.device, session.fused
    batch = 1 if session.dry else SETUPS["r18_cifar_b256"].batch
    shapes = [(64, 32), (128, 16), (256, 8), (512, 4)]
    for channels, side in shapes[-1:] if session.dry else shapes:
        for layout, dtype in ((torch.channels_last, torch.bfloat16), (torch.contiguous_format, torch.float32)):
            variants = {
                f"{form}, {gate}": _unit_call(form, gate, channels, side, batch, layout, dtype, device)
                for gate in ("plain", "bsg")
                for form in ("ann", "lean", fused)
            }
            times: dict[str, list[float]] = {name: [] for name in variants}
            for number in range(4 if session.dry else 26):
                for name, call in variants.items():
                    measured = milliseconds(call, device)
                    if number > 2:
                        times[name].append(measured)
            key = f"C={channels} {side}x{side} {'bf16 nhwc' if dtype == torch.bfloat16 else 'fp32 nchw'}"
            results[key] = {name: round(statistics.median(values), 4) for name, values in times.items()}
            _free()


def _unit_call(
    form: str, gate: str, channels: int, side: int, batch: int, layout: torch.memory_format, dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], None]:  # fmt: skip
    T = 4
    z = torch.randn(T * batch, channels, side, side, device=device).to(dtype).contiguous(memory_format=layout)
    z.requires_grad_()
    x = (torch.rand_like(z) < 0.2).to(dtype).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn_like(z).contiguous(memory_format=layout)

    def forget() -> None:
        z.grad = x.grad = None  # else the next call adds to them

    if form == "ann":
        bn = torch.nn.BatchNorm2d(channels).to(device)

        def twin() -> None:
            y = bn(z)
            torch.relu(y if gate == "plain" else y + x).backward(grad)
            forget()

        return twin
    unit = build_unit(T, channels, None if gate == "plain" else gate, gradient="exact").to(device)
    use_implementation(unit, form)  # type: ignore[arg-type]
    shortcut = None if gate == "plain" else x.unflatten(0, (T, -1))

    def call() -> None:
        unit(z, shortcut).backward(grad.unflatten(0, (T, -1)))
        forget()

    return call


TILES = [(256, 4, 32), (512, 4, 32), (512, 4, 64), (512, 8, 64), (1024, 8, 64), (1024, 4, 32), (2048, 8, 64)]
"""Elements, warps, and channels in NHWC."""
KINDS = {
    "bf16 nhwc": (torch.channels_last, torch.bfloat16),
    "fp32 nchw": (torch.contiguous_format, torch.float32),
}


@contextmanager
def tile(elements: int, warps: int, channels: int) -> Iterator[None]:
    """Units compute with tiles of another size."""
    from spikefleet_models.kernels import triton_unit

    tiles = {(kernel, last): (elements, channels if last else 1) for kernel, last in triton_unit.TILES}
    with mock.patch.dict(triton_unit.TILES, tiles), mock.patch.object(triton_unit, "WARPS", warps):
        triton_unit._plan.cache_clear()
        yield
    triton_unit._plan.cache_clear()


def tile_call(kind: str, channels: int, side: int, device: torch.device) -> Callable[[], None]:
    """Forward and backward of a unit with a gate, as SG ResNet18 with 256 images has it."""
    layout, dtype = KINDS[kind]
    return _unit_call("triton", "bsg", channels, side, 256, layout, dtype, device)


def tile_sizes(session: Session, results: Results) -> None:
    """Time of a unit's kernels with tiles of one size for all, beside what is built in."""
    if session.dry:
        results["skipped"] = "the CPU has no tiles"
        return
    for kind in KINDS:
        for channels, side in ((64, 32), (256, 8)):
            call = tile_call(kind, channels, side, session.device)
            results[f"{kind} C={channels} {side}x{side}, built in"] = _kernel_times(call)
            for sizes in TILES:
                with tile(*sizes):
                    results[f"{kind} C={channels} {side}x{side}, elements, warps, channels {sizes}"] = _kernel_times(
                        call
                    )
            _free()


def _kernel_times(call: Callable[[], None]) -> dict[str, float]:
    """Microseconds of the device by kernel, by the profiler."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            call()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profile.key_averages():
        name = event.key[:70]
        spent[name] = spent.get(name, 0.0) + event.self_device_time_total / 4
    longest = sorted(spent.items(), key=lambda item: -item[1])[:7]
    return {"all": round(sum(spent.values()), 1), **{name: round(value, 1) for name, value in longest if value > 0}}
