"""What needs a GPU: the forms of the spiking unit on CUDA, and training in mixed precision with resumption."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gpu.guarantees import GUARANTEES
from gpu.unit_checks import Case, all_cases, check
from spikefleet.config.recipes import load_config, parse_overrides
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.loop import train
from spikefleet.training.prefetch import ahead
from spikefleet_models.families import build_model, model_config
from spikefleet_models.spiking_unit import use_implementation
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.sampling import EpochPlan
from spikefleet_pipelines.store.reader import Store
from spikefleet_pipelines.transforms.classification_config import TransformConfig

pytestmark = pytest.mark.gpu


CASES = [case for case in all_cases() if case.size != "large" or case.form in ("plain", "bsg exact")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_forms_of_the_unit_equal_the_reference_on_cuda(case: Case) -> None:
    """Spikes and running statistics to the bit in fp32, gradients within rounding, and the same bits twice."""
    assert check(case, torch.device("cuda"), "triton")["problems"] == []


@pytest.mark.parametrize("connection", ["bsg", "bsg_star", "add", "and", "iand", "post_add"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_networks_compute_the_same_in_each_form_on_cuda(connection: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    config = model_config("sg_resnet18", connection=connection, width=0.25)
    reference = build_model(config).cuda().to(memory_format=layout)
    images = torch.randn(8, 3, 32, 32, device="cuda").to(memory_format=layout)
    targets = torch.arange(8, device="cuda")
    networks = {form: copy.deepcopy(reference) for form in ("reference", "lean", "triton")}
    logits = {}
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for form, network in networks.items():
            use_implementation(network, form)  # type: ignore[arg-type]
            logits[form] = network(images)
            F.cross_entropy(logits[form], targets).backward()
    for form in ("lean", "triton"):
        assert torch.equal(logits[form], logits["reference"])
        for (name, ours), theirs in zip(
            networks[form].named_parameters(), networks["reference"].parameters(), strict=True
        ):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert (ours.grad - theirs.grad).norm() <= 0.02 * theirs.grad.norm() + 1e-6, name


@pytest.mark.parametrize("guarantee", list(GUARANTEES))
def test_guarantees_of_the_unit_on_cuda(guarantee: str) -> None:
    GUARANTEES[guarantee]()


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_are_augmented_on_cuda_to_the_bit(stores_dir: Path, processes: int, channels_last: bool) -> None:
    """Copied one step ahead out of page-locked memory, and augmented on the stream that copies."""
    split, device = Store.open(stores_dir / "digits").split("train"), torch.device("cuda")
    plan = EpochPlan(samples=len(split), global_batch=64, seed=3)
    fields: dict[str, Any] = {"crop_padding": 2, "horizontal_flip": 0.5, "cutout": 3, "normalise": "digits"}
    here = BatchLoader(split, TransformConfig(**fields), train=True, seed=5)
    there = BatchLoader(
        split,
        TransformConfig(**fields, augment_on="device"),
        train=True,
        seed=5,
        processes=processes,
        pin_memory=True,
        device=device,
        pixels=True,
    )
    for epoch in (0, 1):
        moved = ahead(there.epoch(plan, epoch), device, channels_last)
        for mine, theirs in zip(here.epoch(plan, epoch), moved, strict=True):
            assert theirs.images.is_cuda
            assert theirs.images.stride() == mine.to("cpu", channels_last).images.stride()
            assert torch.equal(mine.images.view(torch.int32), theirs.images.cpu().contiguous().view(torch.int32))
            assert torch.equal(mine.indices, theirs.indices)
    assert there.copied_bytes == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_cuda(precision: str, stores_dir: Path, tmp_path: Path) -> None:
    settings = [f"train.precision={precision}", "train.epochs=4", "train.channels_last=true", "cluster.gpu=true"]
    config = load_config("digits", parse_overrides([*settings, "cluster.workers=0"]))
    store = Store.open(stores_dir / "digits")
    outcome = train(config, store, tmp_path, ProcessGroup.single(gpu=True), NullSink())
    assert outcome.validation["top1"] > 0.6
