"""The spiking unit: lean form, module form and reference compute the same thing; state and layouts survive.

test_native_unit.py has the native form; what both must keep is tested in both here.
"""

import copy

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

from spikefleet_models import membrane
from spikefleet_models.gates import GateGradient, build_gate
from spikefleet_models.health import SpikeMonitor
from spikefleet_models.kernels import CpuForm
from spikefleet_models.neuron_config import NeuronConfig
from spikefleet_models.neurons import build_neuron
from spikefleet_models.spiking_unit import SpikingUnit, use_implementation

T, B, C, SIZE = 4, 3, 8, 6


def unit(
    gate: str | None = None,
    post_add: bool = False,
    timesteps: int = T,
    gradient: GateGradient = "literal",
    **neuron: object,
) -> SpikingUnit:
    torch.manual_seed(1)
    bn = nn.BatchNorm2d(C)
    nn.init.uniform_(bn.weight, 0.5, 2.0)
    nn.init.normal_(bn.bias)
    gate_module = None if gate is None else build_gate(gate, C, 0.5, surrogate.ATan(), gradient)
    return SpikingUnit(bn, build_neuron(NeuronConfig(**neuron)), timesteps, gate_module, post_add)


def inputs(layout: torch.memory_format = torch.contiguous_format, steps: int = T) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(steps * B, C, SIZE, SIZE, generator=generator) * 2 + 1
    x = (torch.rand(T * B, C, SIZE, SIZE, generator=generator) < 0.4).float()
    weights = torch.randn(T * B, C, SIZE, SIZE, generator=generator)
    return tuple(t.contiguous(memory_format=layout) for t in (z, x, weights))  # type: ignore[return-value]


def run(module: SpikingUnit, z: Tensor, x: Tensor | None, weights: Tensor, repeat: bool = False) -> dict[str, Tensor]:
    z = z.clone().requires_grad_()
    shortcut = None if x is None else x.clone().requires_grad_()
    module.zero_grad()
    if repeat:
        y = module.repeat_over_time(z)
    else:
        y = module(z, None if shortcut is None else shortcut.unflatten(0, (T, -1)))
    (y * weights.unflatten(0, (T, -1))).sum().backward()
    result = {"y": y.detach(), "grad z": z.grad}
    if shortcut is not None:
        result["grad shortcut"] = shortcut.grad
    result |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
    return result | {name: buffer.clone() for name, buffer in module.named_buffers()}  # type: ignore[return-value]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 3e-6) -> None:
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["y"], theirs["y"])
    for name, expected in theirs.items():
        scale = expected.abs().max().clamp_min(1e-3)
        assert (ours[name] - expected).abs().max() <= tolerance * scale, name


FORMS = {
    "plain": {},
    "bsg": {"gate": "bsg"},
    "bsg exact": {"gate": "bsg", "gradient": "exact"},
    "bsg_star": {"gate": "bsg_star"},
    "bsg_star exact": {"gate": "bsg_star", "gradient": "exact"},
    "add": {"gate": "add"},
    "and": {"gate": "and"},
    "iand": {"gate": "iand"},
    "post_add": {"post_add": True},
    "lif soft": {"kind": "lif", "v_reset": None, "detach_reset": False},
    "lif": {"kind": "lif", "v_reset": -0.1, "gate": "bsg"},
    "plif": {"kind": "plif", "gate": "bsg", "detach_reset": False},
    "plif free input": {"kind": "plif", "decay_input": False},
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("tile", [1 << 18, 300])
def test_lean_equals_reference(
    form: str, layout: torch.memory_format, tile: int, monkeypatch: pytest.MonkeyPatch, lean_form: None
) -> None:
    monkeypatch.setattr(membrane, "TILE_ELEMENTS", tile)
    lean = unit(**FORMS[form])
    reference = copy.deepcopy(lean)
    use_implementation(reference, "reference")
    z, x, weights = inputs(layout)
    shortcut = x if lean.gate is not None or lean.post_add else None
    for _ in range(2):  # the second pass starts from updated running statistics
        ours, theirs = run(lean, z, shortcut, weights), run(reference, z, shortcut, weights)
        assert 0.02 < theirs["y"].mean() < 1.4
        assert_same(ours, theirs)
    assert lean.bn.num_batches_tracked == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["if", "plif"])
@pytest.mark.parametrize("tile", [1 << 18, 300])
def test_static_input_is_normalised_once(
    kind: str, layout: torch.memory_format, tile: int, monkeypatch: pytest.MonkeyPatch, lean_form: None
) -> None:
    monkeypatch.setattr(membrane, "TILE_ELEMENTS", tile)
    lean = unit(kind=kind)
    reference = copy.deepcopy(lean)
    use_implementation(reference, "reference")
    _, _, weights = inputs(layout)
    z, _, _ = inputs(layout, steps=1)
    ours, theirs = run(lean, z, None, weights, repeat=True), run(reference, z, None, weights, repeat=True)
    assert ours["y"].shape == (T, B, C, SIZE, SIZE)
    assert_same(ours, theirs)


@pytest.mark.parametrize("change", ["momentum", "eps", "gamma"])
def test_comparison_notices_a_different_norm(change: str, cpu_form: CpuForm) -> None:
    lean = unit()
    reference = copy.deepcopy(lean)
    use_implementation(reference, "reference")
    if change == "momentum":
        reference.bn.momentum = 0.2  # type: ignore[assignment]
    elif change == "eps":
        reference.bn.eps = 1e-2  # type: ignore[assignment]
    else:
        reference.bn.weight.data *= 1.01  # type: ignore[assignment]
    z, _, weights = inputs()
    with pytest.raises(AssertionError):
        assert_same(run(lean, z, None, weights), run(reference, z, None, weights))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", ["plain", "bsg", "bsg exact", "post_add", "plif"])
def test_bf16_keeps_fp32_inside(form: str, layout: torch.memory_format, lean_form: None) -> None:
    lean = unit(**FORMS[form])
    reference = copy.deepcopy(lean)
    use_implementation(reference, "reference")
    z, x, weights = (t.bfloat16() for t in inputs(layout))
    shortcut = x if lean.gate is not None or lean.post_add else None
    ours = run(lean, z, shortcut, weights)
    wide = None if shortcut is None else x.float()
    theirs = run(reference, z.float(), wide, weights.float())
    assert ours["y"].dtype == torch.bfloat16
    assert ours["y"].flatten(0, 1).is_contiguous(memory_format=layout)
    assert torch.equal(ours["y"].float(), theirs["y"])
    error = (ours["grad z"].float() - theirs["grad z"]).abs().max() / theirs["grad z"].abs().max()
    assert error < 2**-8


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_evaluation_uses_running_statistics(layout: torch.memory_format, cpu_form: CpuForm) -> None:
    lean = unit(gate="bsg").eval()
    z, x, _ = inputs(layout)
    lean.bn.running_mean.normal_()
    lean.bn.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(lean.state_dict())
    with torch.no_grad():
        ours = lean(z, x.unflatten(0, (T, -1)))
        use_implementation(lean, "reference")
        assert torch.equal(ours, lean(z, x.unflatten(0, (T, -1))))
    assert all(torch.equal(before[name], value) for name, value in lean.state_dict().items())


def test_evaluation_has_gradients_too() -> None:
    lean = unit(gate="bsg").eval()
    reference = copy.deepcopy(lean)
    use_implementation(reference, "reference")
    z, x, weights = inputs()
    assert_same(run(lean, z, x, weights), run(reference, z, x, weights))


def test_other_normalisations_take_the_module_form(cpu_form: CpuForm) -> None:
    class CountingNorm(nn.BatchNorm2d):
        calls = 0

        def forward(self, z: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(z)

    plain, counted = unit(), unit()
    counting = CountingNorm(C)
    counting.load_state_dict(counted.bn.state_dict())
    counted.bn = counting
    z, _, weights = inputs()
    assert_same(run(counted, z, None, weights), run(plain, z, None, weights))
    assert counting.calls == 1
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(unit())
    assert isinstance(synchronised.bn, nn.SyncBatchNorm)
    assert torch.equal(synchronised.eval()(z), unit().eval()(z))


def test_observed_modules_really_run_and_change_nothing(cpu_form: CpuForm) -> None:
    module, twin = unit(gate="bsg"), unit(gate="bsg")
    z, x, weights = inputs()
    with SpikeMonitor(module) as monitor:
        observed = run(module, z, x, weights)
    assert len(monitor.table()) == 1
    assert_same(observed, run(twin, z, x, weights))


def test_kept_state_is_honoured(cpu_form: CpuForm) -> None:
    module = unit()
    module.neuron.keep_state = True
    z, _, _ = inputs()
    first, second = module(z), module(z)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("form", "tensors"),
    [
        ("plain", ["z"]),
        ("bsg", ["z", "x"]),
        ("bsg exact", ["z", "x"]),
        ("add", ["z"]),
        ("post_add", ["z", "x"]),
    ],
)
def test_saves_the_convolution_output_and_at_most_the_shortcut(form: str, tensors: list[str], lean_form: None) -> None:
    module = unit(**FORMS[form])
    z, x, _ = inputs()
    z.requires_grad_()
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > C:
            saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(z, None if form == "plain" else x.unflatten(0, (T, -1)))
    assert saved == {{"z": z, "x": x}[name].data_ptr() for name in tensors}


@pytest.mark.parametrize("form", ["lean", "reference"])
def test_a_learned_gate_saves_no_more_for_its_exact_gradient(form: str) -> None:
    z, x, _ = inputs()
    z.requires_grad_()
    kept: dict[str, int] = {}
    for gradient in ("literal", "exact"):
        module = unit(gate="bsg_star", gradient=gradient)
        use_implementation(module, form)
        saved: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.add(t.data_ptr()) or t, lambda t: t):  # type: ignore[misc]
            y = module(z, x.unflatten(0, (T, -1)))
        kept[gradient] = len(saved)
        del y
    assert 0 < kept["exact"] <= kept["literal"]


def test_exact_and_literal_gradients_reach_the_convolution_differently(cpu_form: CpuForm) -> None:
    z, x, weights = inputs()
    for gate in ("bsg", "bsg_star"):
        literal, exact = (run(unit(gate=gate, gradient=g), z, x, weights) for g in ("literal", "exact"))
        assert torch.equal(literal["y"], exact["y"])
        assert torch.equal(literal["grad shortcut"], exact["grad shortcut"])
        with pytest.raises(AssertionError):
            assert_same(exact, literal)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_of_the_input_is_kept(layout: torch.memory_format, cpu_form: CpuForm) -> None:
    z, _, _ = inputs(layout)
    assert unit()(z).flatten(0, 1).is_contiguous(memory_format=layout)


def test_second_derivatives_are_refused(cpu_form: CpuForm) -> None:
    z, _, _ = inputs()
    z.requires_grad_()
    weighted = unit()(z) * z.unflatten(0, (T, -1))
    (grad,) = torch.autograd.grad(weighted.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
