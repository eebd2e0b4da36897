"""Training steps to time: ours in each form, SpikingJelly's, the ANN twins, and detectors."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikefleet_models.detection import Objects
from spikefleet_models.families import build_model, model_config
from spikefleet_models.spiking_unit import use_implementation


class Setup(NamedTuple):
    """A network at a size."""

    member: str
    batch: int
    side: int
    classes: int
    timesteps: int
    stem: str


SETUPS = {
    "r18_cifar_b256": Setup("sg_resnet18", 256, 32, 10, 4, "cifar"),
    "r34_imagenet_b64": Setup("sg_resnet34", 64, 224, 1000, 4, "imagenet"),
    "r18_cifar_b32": Setup("sg_resnet18", 32, 32, 10, 4, "cifar"),
}
DRY = Setup("sg_resnet18", 2, 16, 10, 4, "cifar")


class Step:
    """Forward, loss, backward and SGD with momentum; synchronises nothing."""

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        loss: Callable[[Any], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.network, self.images, self.loss, self.autocast = network, images, loss, autocast
        trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            outputs = self.network(self.images)
        self.loss(outputs).backward()
        self.optimizer.step()


class GraphedStep:
    """A bf16 step whose forward and backward pass are captured as one CUDA graph, as `train.cuda_graphs` does it."""

    def __init__(self, step: Step) -> None:
        self.step = step
        # A graph must cast the weights anew in each replay.
        step.autocast = lambda: torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
        for _ in range(3):
            step()
        step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            with step.autocast():
                outputs = step.network(step.images)
            step.loss(outputs).backward()

    def __call__(self) -> None:
        self.graph.replay()
        self.step.optimizer.step()


def _inputs(setup: Setup, device: torch.device, repeats: int, channels_last: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(setup.batch * repeats, 3, setup.side, setup.side, device=device)
    targets = torch.randint(setup.classes, (setup.batch * repeats,), device=device)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images, targets


def _autocast(device: torch.device, bf16: bool) -> Callable[[], AbstractContextManager[Any]]:
    return (lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else nullcontext


def ours(setup: Setup, device: torch.device, form: str, bf16: bool, **overrides: Any) -> Step:
    """SG ResNet in a form; `connection="ann"` is the twin, whose batch is T * B."""
    ann = overrides.get("connection") == "ann"
    images, targets = _inputs(setup, device, setup.timesteps if ann else 1, bf16)
    config = model_config(
        setup.member, num_classes=setup.classes, timesteps=setup.timesteps, stem=setup.stem, **overrides
    )
    network = build_model(config).to(device)
    if bf16:
        network = network.to(memory_format=torch.channels_last)
    use_implementation(network, form)  # type: ignore[arg-type]
    return Step(network, images, lambda y: F.cross_entropy(y.float(), targets), _autocast(device, bf16))


class _Anything(types.ModuleType):
    """Stands for a module that SpikingJelly's package of models imports and its SEW ResNet does not use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(f"{self.__name__}.{name}")

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self


def sew_resnet_module() -> Any:
    """SpikingJelly's module of SEW ResNets, without the other models of its package, which need more libraries."""
    package = "spikingjelly.activation_based.model"
    if package not in sys.modules:
        parent = importlib.import_module("spikingjelly.activation_based")
        module = types.ModuleType(package)
        module.__path__ = [f"{parent.__path__[0]}/model"]
        sys.modules[package] = module
    for name in ("torchvision", "torchvision.models", "torchvision.transforms", "torchvision.datasets", "h5py"):
        try:
            importlib.import_module(name)
        except Exception:
            sys.modules[name] = _Anything(name)
    return importlib.import_module(f"{package}.sew_resnet")


class _SpikingJellyNetwork(nn.Module):
    def __init__(self, network: nn.Module, timesteps: int) -> None:
        super().__init__()
        from spikingjelly.activation_based import functional

        self.network, self.timesteps, self.reset_net = network, timesteps, functional.reset_net

    def forward(self, images: Tensor) -> Tensor:
        self.reset_net(self.network)
        y: Tensor = self.network(images.unsqueeze(0).repeat(self.timesteps, 1, 1, 1, 1)).mean(0)
        return y


def spikingjelly(setup: Setup, device: torch.device, setting: str) -> Step:
    """SpikingJelly's SEW ResNet: "fp32"; "autocast", bf16 as PyTorch users switch it on; "best", its 16-bit neurons."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    best, bf16 = setting == "best", setting != "fp32"
    images, targets = _inputs(setup, device, 1, best)
    network = getattr(sew_resnet_module(), setup.member.replace("sg_", "sew_"))(
        num_classes=setup.classes, cnf="ADD", spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(),
        detach_reset=True,
    )  # fmt: skip
    if setup.stem == "cifar":
        network.conv1 = layer.Conv2d(3, 64, 3, 1, 1, bias=False)
        network.maxpool = nn.Identity()
    functional.set_step_mode(network, "m")
    network = network.to(device)
    if best:
        network = network.to(memory_format=torch.channels_last)
    if best and device.type == "cuda":
        from spikingjelly.activation_based.precision import PrecisionConfig, prepare_model_for_precision

        artifacts = prepare_model_for_precision(network, device, PrecisionConfig(mode="bf16", neuron_storage="bf16"))
        network = artifacts.model
    whole = _SpikingJellyNetwork(network, setup.timesteps)
    return Step(whole, images, lambda y: F.cross_entropy(y.float(), targets), _autocast(device, bf16))


Variants = dict[str, Callable[[], Callable[[], None]]]
"""Names -> builders of steps."""


def classifiers(name: str, setup: Setup, device: torch.device, fused: str) -> Variants:
    """The variants of a setup; only the first has fp32 ones."""
    eager: Variants = {
        "fused bf16": lambda: ours(setup, device, fused, True),
        "ann bf16 (batch T*B)": lambda: ours(setup, device, "lean", True, connection="ann"),
        "spikingjelly best bf16": lambda: spikingjelly(setup, device, "best"),
        "spikingjelly autocast bf16": lambda: spikingjelly(setup, device, "autocast"),
        "fused bf16, sew": lambda: ours(setup, device, fused, True, connection="add", decoder="rate"),
        "lean bf16": lambda: ours(setup, device, "lean", True),
    }
    if name == "r18_cifar_b256":
        eager |= {
            "spikingjelly fp32": lambda: spikingjelly(setup, device, "fp32"),
            "fused fp32": lambda: ours(setup, device, fused, False),
            "ann fp32 (batch T*B)": lambda: ours(setup, device, "lean", False, connection="ann"),
        }
    if device.type != "cuda":
        return eager
    graphed: Variants = {
        f"{kind}, graph": (lambda build=eager[kind]: GraphedStep(build()))  # type: ignore[misc]
        for kind in ("fused bf16", "ann bf16 (batch T*B)", "spikingjelly best bf16", "fused bf16, sew")
    }
    return {**dict(list(eager.items())[:4]), **graphed, **dict(list(eager.items())[4:])}


def detector(member: str, device: torch.device, batch: int, side: int, **overrides: Any) -> Step:
    """SpikeYOLO or its ANN twin with its own criterion; without torchvision, the mean square of the outputs."""
    torch.manual_seed(0)
    config: Any = model_config(member, **overrides)
    network = build_model(config).to(device).to(memory_format=torch.channels_last).train()
    images = torch.rand(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    criterion = config.build_criterion()
    corners = torch.rand(batch, 8, 2) * side / 2
    boxes = torch.cat([corners, corners + 16 + torch.rand(batch, 8, 2) * side / 3], dim=2).to(device)
    labels = torch.randint(config.num_classes, (batch, 8)).to(device)
    objects = [Objects(a, b) for a, b in zip(boxes, labels, strict=True)]

    def loss(outputs: Any) -> Tensor:
        if has_torchvision():
            return criterion.loss(outputs, objects, (side, side))["loss"]
        return torch.stack([output.float().square().mean() for output in outputs]).sum()

    return Step(network, images, loss, _autocast(device, True))


def has_torchvision() -> bool:
    """Whether the real torchvision can be imported."""
    try:
        return not isinstance(importlib.import_module("torchvision"), _Anything)
    except Exception:
        return False
