"""The narrow networks on digits use all their weights: no convolution works on maps of one pixel among zeros."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from spikefleet.config.recipes import load_config
from spikefleet_models.families import build_model
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.opening import open_or_prepare
from spikefleet_pipelines.sampling import EpochPlan


def share_without_gradient(folder: Path, recipe: str, upsample: int) -> float:
    """Share of the weights of convolutions whose gradient is 0 in two steps."""
    config = load_config(recipe, {"data.options": {"upsample": upsample}, "shortcut.where": "none"})
    split = open_or_prepare(config.data, folder).split("train")
    torch.manual_seed(0)
    network = build_model(config.model).train()
    plan = EpochPlan(samples=len(split), global_batch=32)
    loader = BatchLoader(split, config.data.transform, train=True)
    for _, batch in zip(range(2), loader.epoch(plan, epoch=0), strict=False):
        assert isinstance(batch.targets, torch.Tensor)
        F.cross_entropy(network(batch.images), batch.targets).backward()
    weights = [p for p in network.parameters() if p.ndim == 4]
    dead = sum(int((p.grad == 0).sum()) for p in weights if p.grad is not None)
    return dead / sum(p.numel() for p in weights)


def test_every_weight_gets_a_gradient_on_enlarged_digits(tmp_path: Path) -> None:
    options = load_config("digits_narrow").data.options
    assert options == load_config("digits_spiking_resnet18_shortcut").data.options == {"upsample": 2}
    assert share_without_gradient(tmp_path, "digits_narrow", 2) < 0.01
    assert share_without_gradient(tmp_path, "digits_narrow", 1) > 0.6
