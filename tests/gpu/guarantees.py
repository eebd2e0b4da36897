"""What is promised of the spiking unit on a CUDA device: functions that raise AssertionError where it does not hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from gpu.session import Results, Session
from gpu.unit_checks import build_unit
from spikefleet.training.step import Meter, settle, training_step
from spikefleet_models import spiking_unit
from spikefleet_models.families import build_model, model_config
from spikefleet_models.health import SpikeMonitor
from spikefleet_models.spiking_unit import use_implementation
from support.events import KeptEvents
from support.training_steps import CLASSIFIER, DETECTOR, RETINANET, random_batches, task_of, training_state


def the_lean_form_never_runs_where_triton_does() -> None:
    """Units that nobody configured take Triton's form; the check itself would notice the lean one."""
    network = build_model(model_config("sg_resnet18", width=0.25)).cuda()
    images = torch.randn(4, 3, 32, 32, device="cuda")
    with mock.patch.object(spiking_unit._UnitFunction, "apply", side_effect=AssertionError("the lean form ran")):
        network(images).sum().backward()
        use_implementation(network, "lean")
        assert _fails(lambda: network(images), AssertionError)


def observed_units_emit_the_same_spikes() -> None:
    """Hooks make a unit call its modules one by one, which must not change what it computes."""
    network = build_model(model_config("sg_resnet18", width=0.25)).cuda()
    twin = copy.deepcopy(network)
    images = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        with SpikeMonitor(network):
            observed = network(images)
        assert torch.equal(observed, twin(images))


def the_unit_never_waits_for_the_device() -> None:
    """Torch raises where the host waits; the kernels are compiled before."""
    unit = build_unit(4, 32, gate="bsg").cuda()
    z = torch.randn(16, 32, 8, 8, device="cuda", requires_grad=True)
    shortcut = (torch.rand(4, 4, 32, 8, 8, device="cuda") < 0.3).float()
    unit(z, shortcut).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        unit(z, shortcut).sum().backward()
        assert _fails(lambda: z.detach().sum().item(), RuntimeError)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def training_steps_never_wait() -> None:
    """Torch raises where the host waits, in steps of a classifier, in fp16 too, and of both detectors."""
    for words in (CLASSIFIER, [*CLASSIFIER, "train.precision=fp16"], DETECTOR, RETINANET):
        state = training_state(words, torch.device("cuda"))
        assert state.reads_late
        task, meter, told = task_of(state), Meter(), KeptEvents()
        batches = [batch.to("cuda", state.config.train.channels_last) for batch in random_batches(words)]
        for number, batch in enumerate(batches):
            if number == 1:  # the first compiles kernels and allocates
                torch.cuda.set_sync_debug_mode("error")
            try:
                training_step(state, task, batch, meter, told)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert not settle(state, told)
        assert len(told.steps) == len(batches)


def replayed_graphs_compute_the_same() -> None:
    """A captured forward and backward pass, replayed on other input, against a pass without a graph."""
    unit = build_unit(4, 32, gate="bsg", gradient="exact").cuda().eval()
    unit.bn.train()
    twin = copy.deepcopy(unit)
    z = torch.randn(16, 32, 8, 8, device="cuda", requires_grad=True)
    shortcut = (torch.rand(4, 4, 32, 8, 8, device="cuda") < 0.3).float()
    for _ in range(3):
        unit(z, shortcut).sum().backward()
    unit.load_state_dict(twin.state_dict())
    z.grad = None
    unit.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        spikes = unit(z, shortcut)
        spikes.sum().backward()
    unit.load_state_dict(twin.state_dict())
    other = torch.randn_like(z)
    with torch.no_grad():
        z.copy_(other)
    graph.replay()
    expected = other.clone().requires_grad_()
    twin_spikes = twin(expected, shortcut)
    twin_spikes.sum().backward()
    assert torch.equal(spikes, twin_spikes)
    assert z.grad is not None
    assert expected.grad is not None
    assert torch.equal(z.grad, expected.grad)
    assert torch.equal(unit.get_buffer("bn.running_var"), twin.get_buffer("bn.running_var"))


GUARANTEES: dict[str, Callable[[], None]] = {
    work.__name__: work
    for work in (
        the_lean_form_never_runs_where_triton_does,
        observed_units_emit_the_same_spikes,
        the_unit_never_waits_for_the_device,
        training_steps_never_wait,
        replayed_graphs_compute_the_same,
    )
}


def _fails(work: Callable[[], Any], kind: type[Exception]) -> bool:
    try:
        work()
    except kind:
        return True
    return False


def guarantees(session: Session, results: Results) -> None:
    """Whether each holds."""
    if session.dry:
        results["skipped"] = "the CPU has no such form"
        return
    for name, work in GUARANTEES.items():
        try:
            work()
            results[name] = "holds"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"[:600]
