"""What needs a GPU: the lean form on CUDA, and training in mixed precision with resumption."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import train
from spikefleet_models.families import build_model, model_config
from spikefleet_models.spiking_unit import use_implementation
from spikefleet_pipelines.store.reader import Store

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("connection", ["bsg", "bsg_star", "add", "and", "iand", "post_add"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lean_form_equals_the_reference_on_cuda(connection: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    config = model_config("sg_resnet18", connection=connection, width=0.25)
    lean = build_model(config).cuda().to(memory_format=layout)
    reference = copy.deepcopy(lean)
    use_implementation(reference, "reference")
    images = torch.randn(8, 3, 32, 32, device="cuda").to(memory_format=layout)
    targets = torch.arange(8, device="cuda")
    losses = []
    for network in (lean, reference):
        loss = F.cross_entropy(network(images), targets)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for (name, ours), theirs in zip(lean.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() <= 0.02 * theirs.grad.norm() + 1e-6, name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_cuda(precision: str, stores_dir: Path, tmp_path: Path) -> None:
    settings = [f"train.precision={precision}", "train.epochs=4", "train.channels_last=true", "cluster.gpu=true"]
    config = load_config("digits", parse_overrides([*settings, "cluster.workers=0"]))
    store = Store.open(stores_dir / "digits")
    outcome = train(config, store, tmp_path, ProcessGroup.single(gpu=True), NullSink())
    assert outcome.validation["top1"] > 0.6
