"""Initial weights from an ANN twin: currents reach thresholds at the percentile, statistics are the network's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from spikefleet.config.recipes import load_config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.runs.initial_weights import INIT, lineage, resolve_init
from spikefleet.runs.options import Options
from spikefleet.runs.run_dir import Run
from spikefleet.training.checkpoints import INITIAL_WEIGHTS
from spikefleet.training.distributed import ProcessGroup
from spikefleet.training.events import NullSink
from spikefleet.training.fine_tuning import with_unit_names
from spikefleet.training.loop import train
from spikefleet.training.threshold_scaling import capacity, measure_statistics, scale_to_thresholds
from spikefleet_models.families import build_model
from spikefleet_models.spiking_unit import SpikingUnit
from spikefleet_pipelines.loading import Batch
from spikefleet_pipelines.store.reader import Store

TINY: dict[str, Any] = {"model.width": 0.125, "model.timesteps": 2, "train.global_batch": 200, "train.epochs": 1}
ANN = {**TINY, "model.connection": "ann"}


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(torch.randn(32, 1, 8, 8, generator=generator), torch.zeros(32, dtype=torch.int64), torch.arange(32), 32)
        for _ in range(2)
    ]


def network_of(**overrides: Any) -> nn.Module:
    torch.manual_seed(1)
    return build_model(load_config("digits", {**TINY, **overrides}).model)


def twins(**overrides: Any) -> tuple[nn.Module, nn.Module]:
    """A spiking network with the weights of an ANN twin that has measured the images, and the twin."""
    ann, snn = network_of(**{"model.connection": "ann"}), network_of(**overrides)
    measure_statistics(ann, batches())
    snn.load_state_dict({**snn.state_dict(), **with_unit_names(snn.state_dict(), ann.state_dict())})
    return snn, ann


def currents(network: nn.Module) -> dict[str, Tensor]:
    """What the batch norm of each unit returns, over all images, in evaluation."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        unit.bn.register_forward_hook(lambda _, given, out, name=name: found.setdefault(name, []).append(out))
        for name, unit in network.named_modules()
        if isinstance(unit, SpikingUnit)
    ]
    with torch.no_grad():
        for batch in batches():
            network.eval()(batch.network_input)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values).flatten() for name, values in found.items()}


def test_the_percentile_of_the_activations_reaches_the_threshold() -> None:
    snn, ann = twins(**{"model.neuron.v_threshold": 0.5})
    before = currents(ann)
    scaled = scale_to_thresholds(snn, ann, batches(), 99.0)
    assert set(scaled.factors) == {name for name, unit in snn.named_modules() if isinstance(unit, SpikingUnit)}
    first = "stem.unit"  # its input is that of the ANN, so its currents are too
    reached = before[first].clamp_min(0).quantile(0.99)
    assert scaled.factors[first] == pytest.approx(0.5 / float(reached), rel=0.05)
    after = currents(snn)[first]
    assert float(after.clamp_min(0).quantile(0.99)) == pytest.approx(0.5, rel=0.05)
    assert float(before[first].clamp_min(0).quantile(0.99)) != pytest.approx(0.5, rel=0.2)
    assert scaled.images == 64
    assert "by " in scaled.sentence()
    assert "percentile 99 of activations" in scaled.sentence()


def test_statistics_are_those_of_the_spiking_network() -> None:
    snn, ann = twins()
    scale_to_thresholds(snn, ann, batches(), 99.0)
    norm, theirs = (one.get_submodule("stages.1.0.units.1.bn") for one in (snn, ann))
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(theirs, nn.BatchNorm2d)
    inputs: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    measured = norm.running_mean
    assert measured is not None
    kept = measured.clone()
    with torch.no_grad():
        for batch in batches():
            snn.train()(batch.network_input)
    means = torch.stack([one.mean((0, 2, 3)) for one in inputs]).mean(0)
    assert torch.allclose(kept, means, atol=1e-5)
    assert not torch.allclose(kept, theirs.running_mean, atol=1e-3)  # type: ignore[arg-type]  # spikes are no activations


def test_another_bound_scales_by_its_ratio_and_another_t_by_nothing() -> None:
    ilif = {"model.neuron": {"kind": "ilif", "bound": 4}, "model.connection": "add"}
    source = network_of(**ilif)
    target = network_of(**{**ilif, "model.neuron": {"kind": "ilif", "bound": 2}})
    target.load_state_dict(source.state_dict())
    units = [unit for unit in target.modules() if isinstance(unit, SpikingUnit)]
    assert {capacity(unit) for unit in units} == {2}
    scaled = scale_to_thresholds(target, source, batches(), 99.9)
    assert set(scaled.factors.values()) == {0.5}
    assert scaled.percentile is None
    longer = network_of(**{**ilif, "model.timesteps": 4})
    assert set(scale_to_thresholds(longer, source, batches(), 99.9).factors.values()) == {1.0}


def test_what_cannot_be_scaled_is_refused() -> None:
    snn, ann = twins()
    with torch.no_grad():
        ann.get_submodule("stem.unit.bn").weight.zero_()  # type: ignore[operator, union-attr]
        ann.get_submodule("stem.unit.bn").bias.fill_(-1)  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match=r"this percentile of the activations of stem\.unit is 0, so that it cannot"):
        scale_to_thresholds(snn, ann, batches(), 99.0)
    with pytest.raises(UserError, match="needs batch norms directly before neurons, which this network does not have"):
        scale_to_thresholds(network_of(**{"model.connection": "ann"}), ann, batches(), 99.0)
    with pytest.raises(UserError, match=r"scale_thresholds has no effect without init\.from"):
        load_config("digits", {"init.scale_thresholds": 99.9})


def test_a_run_starts_from_the_scaled_weights_of_a_twin(stores_dir: Path, tmp_path: Path, no_figures: None) -> None:
    store, quiet = Store.open(stores_dir / "digits"), Console(quiet=True)
    here = {"data.store": str(stores_dir / "digits"), "cluster.workers": 0}
    twin = load_config("digits", {**ANN, **here})
    run = Run(tmp_path / "twin")
    run.begin(twin, DataSummary.of(store.manifest))
    train(twin, store, run.path, ProcessGroup.single(), NullSink())
    wanted = {**TINY, **here, "init.from": "twin", "init.scale_thresholds": 99.9, "init.batches": 2}
    config, weights = resolve_init(load_config("digits", wanted), Options(tmp_path), "sqlite:///unused", quiet)
    assert weights is not None
    assert weights.fitted.anew == ()  # also the batch norms of shortcuts, which have other names in the twin
    again, _ = resolve_init(load_config("digits", wanted), Options(tmp_path), "sqlite:///unused", quiet)
    plain, _ = resolve_init(
        load_config("digits", {**wanted, "init.scale_thresholds": None}), Options(tmp_path), "sqlite:///unused", quiet
    )
    assert again.digest() == config.digest() != plain.digest()
    child = Run(tmp_path / "child")
    weights.write(child)
    record = json.loads((child.path / INIT).read_text())
    assert record["scaled"]["percentile"] == 99.9
    assert "percentile 99.9 of activations" in lineage(child)["init_scaled"]
    trained = train(config, store, child.path, ProcessGroup.single(), NullSink())
    assert len(trained.history) == 1
    assert load_file(child.path / INITIAL_WEIGHTS).keys() == weights.fitted.taken.keys()
    loose = tmp_path / "w.safetensors"
    loose.write_bytes((child.path / INITIAL_WEIGHTS).read_bytes())
    with pytest.raises(UserError, match="needs the configuration of the trained network, which a file of weights does"):
        resolve_init(
            load_config("digits", {**wanted, "init.from": str(loose)}), Options(tmp_path), "sqlite:///u", quiet
        )
