"""Spikes kept as bits for the backward pass: less memory; losses, gradients and statistics equal to the last bit."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from spikefleet_models import gates, neurons, spiking_unit
from spikefleet_models.families import build_model, model_config
from spikefleet_models.health import SpikeMonitor
from spikefleet_models.kernels import native_flaw
from spikefleet_models.packed_spikes import _pack, note_spikes, noted_bound, packed_spikes
from spikefleet_models.spiking_unit import use_implementation

T, B = 2, 2
FORMS = ("lean", "native", "reference")


def network(connection: str = "bsg", form: Any = "lean", **neuron: object) -> nn.Module:
    torch.manual_seed(0)
    fields = {"stages": (1, 1), "width": 0.125, "timesteps": T, "decoder": "rate", "neuron": neuron}
    model = build_model(model_config("sg_resnet_tiny", connection=connection, **fields))
    use_implementation(model, form)
    return model.train()


def images(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(B, 1, 9, 9, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)


class Kept:
    """The distinct tensors that autograd keeps, parameters apart."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._not = set() if model is None else {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.tensors: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._not:
            self.tensors[place] = tensor
        return tensor

    @property
    def packed(self) -> int:
        return sum(tensor.dtype == torch.uint8 for tensor in self.tensors.values())

    @property
    def mib(self) -> float:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values()) / 2**20


def step(model: nn.Module, x: Tensor, packs: bool, bf16: bool = False) -> tuple[list[Tensor | None], Kept]:
    """Loss, gradients and buffers of a training step on a copy, and what was kept where spikes are packed."""
    model = copy.deepcopy(model)
    kept = Kept(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), packed_spikes(kept) if packs else nullcontext():
        outputs = model(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = torch.stack([(output.float() ** 2).mean() for output in outputs]).sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()], kept


def equal(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    ("layout", "bf16"),
    [(torch.contiguous_format, False), (torch.channels_last, True), (torch.channels_last, False)],
    ids=["fp32 NCHW", "bf16 NHWC", "fp32 NHWC"],
)
@pytest.mark.parametrize(
    ("connection", "neuron"),
    [
        ("bsg", {"kind": "if"}),
        ("bsg_star", {"kind": "lif"}),
        ("and", {"kind": "plif"}),
        ("iand", {"kind": "ilif", "bound": 1}),
        ("add", {"kind": "ilif", "bound": 4}),
        ("add", {"kind": "if"}),
        ("post_add", {"kind": "ilif", "bound": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_changes_but_what_is_kept(
    form: str, connection: str, neuron: dict[str, object], layout: torch.memory_format, bf16: bool
) -> None:
    if form == "native" and native_flaw() is not None:
        pytest.skip(f"the native form cannot be used: {native_flaw()}")
    model, x = network(connection, form, **neuron).to(memory_format=layout), images(layout)
    plain, _ = step(model, x, packs=False, bf16=bf16)
    packed, kept = step(model, x, packs=True, bf16=bf16)
    assert equal(packed, plain)
    # The input of each 3x3 convolution but the first; a gate of the reference form notes nothing.
    assert kept.packed >= (2 if form == "reference" else 4)


def test_a_tensor_that_is_no_spikes_shows_in_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the comparison above: what packing loses is seen."""
    model, x = network("add", kind="ilif", bound=3), images()
    plain, _ = step(model, x, packs=False)
    for module in (neurons, spiking_unit, gates):
        monkeypatch.setattr(module, "note_spikes", lambda tensor, bound: note_spikes(tensor, 1))
    packed, _ = step(model, x, packs=True)
    assert equal(packed[:1], plain[:1])
    assert not equal(packed, plain)


def test_a_hook_that_replaces_spikes_is_seen() -> None:
    """What a hook returns was emitted by nobody, so that nothing is known of it."""
    found = []
    for packs in (False, True):
        model = network("bsg")
        for name, module in model.named_modules():
            if name.endswith(("neuron", "gate")):
                module.register_forward_hook(lambda module, inputs, output: output * 1.5)
        with packed_spikes() if packs else nullcontext():
            loss = (model(images()) ** 2).mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert equal(found[1], found[0])


@pytest.mark.parametrize("name", ["spike_yolo_tiny", "retinanet_tiny", "seven_b_net_narrow"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_detectors_and_event_networks(name: str, bf16: bool) -> None:
    torch.manual_seed(0)
    fields: dict[str, dict[str, Any]] = {
        "seven_b_net_narrow": {"timesteps": T, "channels": (8, 16)},
        "spike_yolo_tiny": {"timesteps": T},
    }
    model = build_model(model_config(name, **fields.get(name, {}))).train()
    x = torch.randn(T, B, 2, 12, 12) if name.startswith("seven") else torch.randn(1, 3, 64, 64)
    plain, _ = step(model, x, packs=False, bf16=bf16)
    packed, kept = step(model, x, packs=True, bf16=bf16)
    assert equal(packed, plain)
    # The input of each convolution behind a neuron or a pool of spikes.
    assert kept.packed >= 8


def test_a_monitored_step_keeps_bits_too() -> None:
    model = network("bsg_star")
    with SpikeMonitor(model):
        kept = Kept()
        with packed_spikes(kept):
            model(images())
    assert kept.packed >= 4


@pytest.mark.parametrize(("precision", "most", "least_without"), [("fp32", 165.0, 280.0), ("bf16", 110.0, 160.0)])
def test_what_sg_resnet18_keeps(precision: str, most: float, least_without: float) -> None:
    """MiB at T=4, batch 16, 32x32, of a batch of 2: all but bf16 copies of the weights is in proportion to it."""
    torch.manual_seed(0)
    model = build_model(model_config("sg_resnet18", timesteps=4)).train()
    bf16 = precision == "bf16"
    copies = sum(p.numel() for p in model.parameters()) * 2 / 2**20 if bf16 else 0.0

    def of_16(kept: Kept) -> float:
        return (kept.mib - copies) * 8 + copies

    for packs in (True, False):
        kept = Kept(model)
        saving = packed_spikes(kept) if packs else torch.autograd.graph.saved_tensors_hooks(kept, lambda t: t)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), saving:
            output = model(torch.randn(2, 3, 32, 32))
        assert of_16(kept) <= most if packs else of_16(kept) >= least_without
        del output


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool])
def test_packing_is_exact(dtype: torch.dtype, count: int) -> None:
    for bound in (1, 2, 255):
        if dtype == torch.bool and bound > 1:
            continue
        numbers = torch.randint(0, bound + 1, (count,), generator=torch.Generator().manual_seed(count)).to(dtype)
        before, packed = numbers.clone(), _pack(numbers, bound)
        assert torch.equal(packed.unpack(), before)
        assert torch.equal(numbers, before)
        assert packed.data.numel() == (-(-count // 8) if bound == 1 else count)


def spikes(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.3).float()


def test_a_tensor_of_several_consumers_is_packed_once() -> None:
    w = torch.randn(4, 6, requires_grad=True)
    kept = Kept()
    with packed_spikes(kept):
        s = spikes(4, 6)
        note_spikes(s, 1)
        y = (s * w).sum() + (s.t() * w.t()).exp().sum() + (s[1:] * w[1:]).sum()
    assert kept.packed == 1
    y.backward()
    expected = s + s * (s * w.detach()).exp()
    expected[1:] += s[1:]
    torch.testing.assert_close(w.grad, expected)


@pytest.mark.parametrize("bound", [None, 256])
def test_what_no_byte_holds_is_kept_as_it_is(bound: int | None) -> None:
    kept = Kept()
    with packed_spikes(kept):
        s = spikes(4) * 256
        note_spikes(s, bound)
        assert noted_bound(s) is None
        (s * torch.ones(4, requires_grad=True)).sum()
    assert kept.packed == 0


def test_a_modified_tensor_is_no_longer_known() -> None:
    w = torch.ones(16, requires_grad=True)
    with packed_spikes():
        s = spikes(16)
        note_spikes(s, 1)
        assert noted_bound(s.view(4, 4)) == 1
        s.mul_(3.5)
        assert noted_bound(s) is None
        y = (s * w).sum()
    y.backward()
    assert torch.equal(w.grad, s)  # type: ignore[arg-type]
    assert s.max() == 3.5


def test_a_new_tensor_in_the_place_of_noted_spikes_is_not_taken_for_them() -> None:
    with packed_spikes():
        memory = bytearray(8 * 4)
        s = torch.frombuffer(memory, dtype=torch.float32)
        note_spikes(s, 1)
        assert noted_bound(s) == 1
        place = s.data_ptr()
        del s
        memory[:] = array("f", [0.5] * 8).tobytes()
        other = torch.frombuffer(memory, dtype=torch.float32)  # as new as it was: not told by its version
        assert other.data_ptr() == place
        assert noted_bound(other) is None


def test_nothing_is_known_outside_of_the_block() -> None:
    s = spikes(8)
    note_spikes(s, 1)
    with packed_spikes():
        assert noted_bound(s) is None
        note_spikes(s, 1)
        assert noted_bound(s) == 1
    assert noted_bound(s) is None


@pytest.mark.parametrize("modified", [True, False])
def test_a_kept_tensor_that_was_modified_is_refused(modified: bool) -> None:
    x = torch.ones(4, requires_grad=True)
    with packed_spikes():
        y = x * 2
        z = y.square().sum()
    if modified:
        y.detach().add_(1)
        with pytest.raises(RuntimeError, match="was modified by an in-place operation: it is at version 1, expected 0"):
            z.backward()
    else:
        z.backward()
        assert torch.equal(x.grad, torch.full((4,), 8.0))  # type: ignore[arg-type]


def test_an_output_that_its_operation_keeps_is_freed() -> None:
    """A hook that returns the tensor itself would have the operation hold its own output, for ever."""
    import gc
    import weakref

    gc.disable()
    try:
        with packed_spikes():
            y = torch.ones(4, requires_grad=True).exp()
        seen = weakref.ref(y)
        del y
        assert seen() is None
    finally:
        gc.enable()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_in_data_parallelism() -> None:
    model = network()
    plain, _ = step(model, images(), packs=False)
    ddp, kept = DistributedDataParallel(copy.deepcopy(model), gradient_as_bucket_view=True), Kept()
    with packed_spikes(kept):
        loss = (ddp(images()) ** 2).mean()
    loss.backward()
    assert kept.packed >= 4
    assert equal([loss.detach(), *(p.grad for p in ddp.parameters()), *ddp.buffers()], plain)
