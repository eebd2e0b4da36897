"""Weight gradients of convolutions in bf16 on a CPU: equal to torch's but for rounding, and nothing else changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikefleet_models import build_model, model_config, weight_gradients
from spikefleet_models.packed_spikes import packed_spikes
from spikefleet_models.recomputation import recompute_stages
from spikefleet_models.reparam import deploy
from spikefleet_models.weight_gradients import (
    CHOICE,
    WeightGradients,
    chosen_form,
    fastest_form,
    form_for,
    use_weight_gradients,
)

OWN: list[WeightGradients] = ["bf16", "fp32"]
ROUNDING = 2**-8

# (images, in, out, kernel, stride, padding, height, width) and what each form computes there
SHAPES: list[tuple[tuple[Any, ...], str | None, str | None]] = [
    ((64, 32, 48, 3, 1, 1, 4, 4), "bf16 product", "fp32 product"),
    ((7, 16, 33, 3, 1, 1, 3, 5), "bf16 product", "fp32 product"),
    ((5, 17, 16, 3, 2, 1, 9, 7), "bf16 product", "fp32 kernel"),
    ((8, 32, 32, 3, 2, 1, 8, 8), "bf16 product", "fp32 product"),
    ((8, 32, 32, 3, 1, 1, 8, 8), "bf16 product", "fp32 kernel"),
    ((2, 16, 24, 3, 1, 1, 9, 8), None, "fp32 kernel"),
    ((3, 16, 16, 5, 1, 2, 17, 16), None, "fp32 kernel"),
    ((6, 32, 16, 1, 1, 0, 8, 8), "bf16 product", "fp32 product"),
    ((6, 16, 32, 1, 2, 0, 7, 9), "bf16 product", "fp32 product"),
    ((2, 16, 32, 1, 1, 0, 9, 8), "bf16 product", None),
    ((4, 16, 16, 1, 1, 1, 3, 3), "bf16 product", "fp32 product"),
    ((4, 16, 16, (3, 1), (1, 2), (1, 0), 6, 5), "bf16 product", "fp32 kernel"),
    ((4, 16, 16, (2, 4), (2, 3), (0, 2), 5, 4), "bf16 product", "fp32 product"),
    ((1, 16, 16, 3, 1, 1, 1, 1), "bf16 product", "fp32 product"),
]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of weight gradients that were computed, in this order."""
    kinds: list[str] = []
    compute = weight_gradients._weight_gradient

    def noting(*arguments: Any) -> Tensor:
        kinds.append(arguments[-1])
        return compute(*arguments)

    monkeypatch.setattr(weight_gradients, "_weight_gradient", noting)
    return kinds


@contextmanager
def in_bf16() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def convolution(shape: tuple[Any, ...], **options: Any) -> tuple[nn.Conv2d, Tensor]:
    images, channels, out, kernel, stride, padding, height, width = shape
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, kernel, stride, padding, **{"bias": False, **options})
    spikes = channels_last((torch.rand(images, channels, height, width) < 0.3).float())
    return conv.to(memory_format=torch.channels_last), spikes


def passed(conv: nn.Conv2d, x: Tensor, seed: int = 1) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Output, gradient of the input, gradient of the weight, and the gradient that was passed back."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    conv.weight.grad = None
    with in_bf16():
        y = conv(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    y.backward(channels_last(grad))
    assert conv.weight.grad is not None
    return y.detach(), x.grad, conv.weight.grad.clone(), grad


def off_by(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.parametrize("form", OWN)
@pytest.mark.parametrize(("shape", "in_bf16_form", "in_fp32_form"), SHAPES)
def test_only_the_weight_gradient_differs_and_by_a_rounding(
    shape: tuple[Any, ...],
    in_bf16_form: str | None,
    in_fp32_form: str | None,
    form: WeightGradients,
    computed: list[str],
) -> None:
    conv, x = convolution(shape)
    y, grad_x, expected, grad = passed(conv, x)
    assert computed == []
    use_weight_gradients(conv, form)
    own_y, own_grad_x, own, _ = passed(conv, x)
    kind = in_bf16_form if form == "bf16" else in_fp32_form
    assert computed == ([] if kind is None else [kind])
    assert torch.equal(own_y, y)
    assert grad_x is not None
    assert own_grad_x is not None
    assert torch.equal(own_grad_x, grad_x)
    assert own.stride() == expected.stride()
    assert own.dtype == expected.dtype

    # In fp64 no sum of bf16 numbers is rounded.
    exact_weight = conv.weight.detach().double().requires_grad_()
    F.conv2d(x.double(), exact_weight, None, conv.stride, conv.padding).backward(grad.double())
    exact = exact_weight.grad
    assert exact is not None
    assert off_by(own, exact) <= ROUNDING
    assert off_by(own, expected) <= ROUNDING
    if kind is not None:
        # Each number is the exact one, rounded to bf16 once: by at most 2^-8 of itself, but for fp32's own error.
        assert bool(((own.double() - exact).abs() <= exact.abs() * ROUNDING + 1e-5 * exact.abs().max()).all())


def test_the_check_would_see_a_wrong_column(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = convolution(SHAPES[0][0])
    _, _, expected, _ = passed(conv, x)
    columns = weight_gradients._columns
    monkeypatch.setattr(weight_gradients, "_columns", lambda *arguments: columns(*arguments).roll(32, 1))
    use_weight_gradients(conv, "fp32")
    assert off_by(passed(conv, x)[2], expected) > 0.1


REFUSED: dict[str, dict[str, Any]] = {
    "groups": {"groups": 2},
    "dilation": {"dilation": 2},
    "bias": {"bias": True},
    "padding_mode": {"padding_mode": "reflect"},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("form", OWN)
def test_what_is_not_computed_is_torchs(form: WeightGradients, options: dict[str, Any], computed: list[str]) -> None:
    conv, x = convolution((4, 32, 32, 3, 1, 1, 6, 6), **options)
    before = passed(conv, x)
    use_weight_gradients(conv, form)
    assert all(map(torch.equal, passed(conv, x), before))  # type: ignore[arg-type]
    assert computed == []


@pytest.mark.parametrize("form", OWN)
def test_it_is_computed_in_training_in_bf16_and_channels_last_alone(form: WeightGradients, computed: list[str]) -> None:
    conv, x = convolution((4, 32, 32, 3, 1, 1, 4, 4))
    use_weight_gradients(conv, form)
    same = nn.Conv2d(32, 32, 3, padding="same", bias=False)
    few, one = convolution((4, 8, 32, 3, 1, 1, 4, 4))
    for other in (same, few):
        use_weight_gradients(other, form)
    with in_bf16():
        same(x).sum().backward()
        few(one).sum().backward()
        conv(x.contiguous()).sum().backward()
        conv.eval()(x).sum().backward()
        conv.train()
        with torch.no_grad():
            conv(x)
        conv(x[0]).sum().backward()
        conv(x[:0]).sum().backward()
    conv(x).sum().backward()  # fp32
    with torch.autocast("cpu", torch.float16):
        conv(x).sum().backward()
    conv.weight.requires_grad_(False)
    with in_bf16():
        conv(x.clone().requires_grad_()).sum().backward()
    assert computed == []
    conv.weight.requires_grad_(True)
    with in_bf16():
        conv(x).sum().backward()
    assert computed == [f"{form} product"]


@pytest.mark.parametrize("form", OWN)
def test_fp32_keeps_its_bits(form: WeightGradients) -> None:
    network, images, classes = tiny()
    expected = steps(network, images, classes, autocast=False)
    own, _, _ = tiny()
    use_weight_gradients(own, form)
    assert steps(own, images, classes, autocast=False) == expected
    assert all(map(torch.equal, own.state_dict().values(), network.state_dict().values()))


def test_too_many_columns_are_not_laid_out(monkeypatch: pytest.MonkeyPatch, computed: list[str]) -> None:
    conv, x = convolution((4, 32, 32, 3, 1, 1, 4, 4))
    count = 4 * 16 * 9 * 32
    for most, expected in ((count, ["fp32 product"]), (count - 1, ["fp32 kernel"])):
        monkeypatch.setattr(weight_gradients, "_MOST_COLUMNS", most)
        use_weight_gradients(conv, "fp32")
        passed(conv, x)
        assert computed == expected
        computed.clear()
    use_weight_gradients(conv, "bf16")
    passed(conv, x)
    assert computed == []


def tiny(**overrides: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """Four stages of 16 to 128 channels."""
    torch.manual_seed(0)
    fields = {"num_classes": 10, "timesteps": 2, "width": 0.25, **overrides}
    network = build_model(model_config("sg_resnet18", **fields)).to(memory_format=torch.channels_last).train()
    return network, channels_last(torch.randn(4, 3, 16, 16)), torch.randint(10, (4,))


def loss_of(network: nn.Module, images: Tensor, classes: Tensor, autocast: bool = True) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return F.cross_entropy(network(images).float(), classes)


def steps(network: nn.Module, images: Tensor, classes: Tensor, autocast: bool = True, count: int = 4) -> list[float]:
    """Losses of training steps."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of(network, images, classes, autocast)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("form", OWN)
def test_a_training_hardly_changes(form: WeightGradients, computed: list[str]) -> None:
    """Both kernels round sums in fp32 to bf16: one in many thousand gradients differs, by one unit of bf16."""
    network, images, classes = tiny()
    own, _, _ = tiny()
    use_weight_gradients(own, form)
    expected, found = (gradients(net, (images, classes)) for net in (network, own))
    assert len(computed) >= 8
    differing = sum(int((found[name] != expected[name]).sum()) for name in expected)
    assert differing <= 1e-3 * sum(grad.numel() for grad in expected.values())
    for name, grad in expected.items():
        assert bool(((found[name] - grad).abs() <= grad.abs() * 2**-7 + 1e-4 * grad.abs().max()).all()), name
    theirs, ours = (steps(net, images, classes) for net in (network, own))
    assert ours[0] == theirs[0]
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
    assert ours == pytest.approx(theirs, rel=2e-2)  # once a spike differs


def gradients(network: nn.Module, *batches: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    network.zero_grad()
    for images, classes in batches:
        loss_of(network, images, classes).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", OWN)
def test_it_goes_with_bits_recomputation_copies_and_accumulation(form: WeightGradients, computed: list[str]) -> None:
    network, images, classes = tiny()
    use_weight_gradients(network, form)
    plain = gradients(network, (images, classes))
    own = len(computed)
    assert own > 0

    again = copy.deepcopy(network)
    recompute_stages(again, 4)
    computed.clear()
    found = gradients(again, (images, classes))
    assert len(computed) == own
    assert all(torch.equal(found[name], plain[name]) for name in plain)

    network.zero_grad()
    with packed_spikes():
        loss = loss_of(network, images, classes)
    loss.backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in network.named_parameters() if p.grad is not None)

    both = gradients(network, (images[:2], classes[:2]), (images[2:], classes[2:]))
    parts = [gradients(network, part) for part in ((images[:2], classes[:2]), (images[2:], classes[2:]))]
    assert all(torch.equal(both[name], parts[0][name] + parts[1][name]) for name in both)


def test_spikes_are_still_kept_as_bits() -> None:
    kept: dict[WeightGradients, int] = {}
    for form in get_args(WeightGradients):
        network, images, classes = tiny()
        use_weight_gradients(network, form)
        storages: dict[int, int] = {}

        def count(tensor: Tensor, seen: dict[int, int] = storages) -> None:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

        with packed_spikes(count):
            loss_of(network, images, classes)
        kept[form] = sum(storages.values())
    assert kept["bf16"] == kept["fp32"] == kept["torch"]


def test_a_copy_has_weights_of_its_own(computed: list[str]) -> None:
    conv, x = convolution((4, 32, 32, 3, 1, 1, 4, 4))
    use_weight_gradients(conv, "fp32")
    twin = copy.deepcopy(conv)
    with torch.no_grad():
        twin.weight.zero_()
    with in_bf16():
        y = twin(x)
    assert y.abs().max() == 0
    y.sum().backward()
    assert twin.weight.grad is not None
    assert conv.weight.grad is None
    assert computed == ["fp32 product"]
    assert list(conv.state_dict()) == ["weight"]
    assert list(conv.children()) == []

    stream = io.BytesIO()
    torch.save(conv.state_dict(), stream)
    stream.seek(0)
    twin.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(twin.weight, conv.weight)


def test_hooks_see_what_they_saw(computed: list[str]) -> None:
    conv, x = convolution((4, 32, 32, 3, 1, 1, 4, 4))

    def observed() -> dict[str, Any]:
        seen: dict[str, Any] = {}
        handles = [
            conv.register_forward_hook(lambda m, args, y: seen.update(output=y.detach())),
            conv.register_full_backward_hook(lambda m, grad_in, grad_out: seen.update(back=(*grad_in, *grad_out))),
            conv.weight.register_hook(lambda grad: seen.update(weight=grad)),
        ]
        passed(conv, x)
        for handle in handles:
            handle.remove()
        return seen

    expected = observed()
    use_weight_gradients(conv, "fp32")
    found = observed()
    assert computed == ["fp32 product"]
    assert torch.equal(found["output"], expected["output"])
    assert all(map(torch.equal, found["back"], expected["back"]))
    assert off_by(found["weight"], expected["weight"]) <= ROUNDING
    assert found["weight"].dtype == expected["weight"].dtype == torch.float32


def test_a_shared_weight_gets_the_gradients_of_all_its_uses(computed: list[str]) -> None:
    conv, x = convolution((4, 32, 32, 3, 1, 1, 4, 4))
    other = nn.Conv2d(32, 32, 3, 2, 1, bias=False).to(memory_format=torch.channels_last)
    other.weight = conv.weight

    def gradient() -> Tensor:
        conv.weight.grad = None
        with in_bf16():
            loss = conv(conv(x)).float().square().mean() + other(x).float().square().mean()
        loss.backward()
        assert conv.weight.grad is not None
        return conv.weight.grad

    expected = gradient()
    use_weight_gradients(nn.ModuleList([conv, other]), "fp32")
    assert off_by(gradient(), expected) <= 3 * ROUNDING
    assert computed == ["fp32 product"] * 3


def test_backward_inside_autocast_is_the_same(computed: list[str]) -> None:
    conv, x = convolution(SHAPES[0][0])
    use_weight_gradients(conv, "fp32")
    expected = passed(conv, x)[2]
    with in_bf16():
        assert torch.equal(passed(conv, x)[2], expected)
    assert computed == ["fp32 product"] * 2


def test_a_deployed_network_is_the_same() -> None:
    network, images, _ = tiny()
    plain = deploy(copy.deepcopy(network).eval())
    use_weight_gradients(network, "fp32")
    with torch.no_grad():
        assert torch.equal(deploy(copy.deepcopy(network).eval())(images), plain(images))
    use_weight_gradients(network, "torch")
    assert all("forward" not in vars(module) for module in network.modules() if isinstance(module, nn.Conv2d))


def test_somebody_elses_forward_and_subclasses_are_left_alone() -> None:
    class Other(nn.Conv2d):
        pass

    def twice(x: Tensor) -> Tensor:
        return nn.Conv2d.forward(replaced, x) * 2

    replaced, subclass = nn.Conv2d(16, 16, 3), Other(16, 16, 3)
    setattr(replaced, "forward", twice)  # noqa: B010
    use_weight_gradients(nn.ModuleList([replaced, subclass]), "fp32")
    use_weight_gradients(nn.ModuleList([replaced, subclass]), "torch")
    assert replaced.forward is twice
    assert "forward" not in vars(subclass)


def test_the_compiler_traces_torchs_own(computed: list[str]) -> None:
    conv, x = convolution((4, 32, 32, 3, 1, 1, 4, 4))
    use_weight_gradients(conv, "fp32")
    compiled = torch.compile(conv, backend="eager", fullgraph=True)
    with in_bf16():
        compiled(x).sum().backward()
    assert computed == []
    assert conv.weight.grad is not None
    network = nn.Sequential(conv)
    exported = torch.export.export(network, (x,))
    assert torch.equal(exported.module()(x), network(x))


AMX = {"amx_bf16": True, "avx512_bf16": True, "avx512_fp16": True, "cpu_name": "Intel Xeon"}


def test_the_form_follows_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert form_for(AMX) == "bf16"
    assert form_for({**AMX, "amx_bf16": False}) == "fp32"
    assert form_for({**AMX, "amx_bf16": False, "avx512_fp16": False}) == "torch"
    assert form_for({**AMX, "amx_bf16": False, "cpu_name": "AMD EPYC"}) == "torch"
    assert form_for({**AMX, "amx_bf16": False, "avx512_bf16": False}) == "torch"
    assert form_for({}) == "torch"
    monkeypatch.delenv(CHOICE, raising=False)
    assert chosen_form() == fastest_form()
    for form in get_args(WeightGradients):
        monkeypatch.setenv(CHOICE, form)
        assert chosen_form() == form
    monkeypatch.setenv(CHOICE, "fast")
    with pytest.raises(ValueError, match="SPIKEFLEET_WEIGHT_GRADIENTS is 'fast', expected one of torch, bf16, fp32"):
        chosen_form()
    with pytest.raises(ValueError, match="form is 'fast'"):
        use_weight_gradients(nn.Conv2d(1, 1, 1), "fast")  # type: ignore[arg-type]
