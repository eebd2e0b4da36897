"""The first layer's gradient over depth: measured on a real network, kept, and averaged over seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from spikefleet.errors import UserError
from spikefleet.reproduction.depth_gradients import CONNECTIONS, DEPTHS, DepthGradient, DepthGradients, measure

SMALL = {"model.width": 0.125, "model.timesteps": 2, "model.decoder": "rate"}


def test_gradients_are_measured_and_kept(tmp_path: Path) -> None:
    plain, branches = (measure("digits_narrow", SMALL, "BSG", with_, 10, 0, images=4) for with_ in (False, True))
    assert len(plain.rates) == len(branches.rates) >= 9
    assert plain.rates == branches.rates  # side branches change what comes back, not what goes forward
    assert plain.first_to_last != branches.first_to_last
    assert measure("digits_narrow", SMALL, "BSG", False, 10, 0, images=4) == plain
    kept = DepthGradients("digits_narrow", SMALL, "abc", (plain, branches))
    kept.write(tmp_path)
    assert DepthGradients.read(tmp_path) == kept
    assert DepthGradients.read(tmp_path / "elsewhere") is None
    (tmp_path / "depth_gradients.json").write_text('{"recipe": "", "overrides": {}, "code_version": "", "rows": [{}]}')
    with pytest.raises(UserError, match=r"depth_gradients\.json is damaged"):
        DepthGradients.read(tmp_path)


def test_seeds_are_averaged_geometrically() -> None:
    rows = [
        DepthGradient("BSG", False, layers, seed, ratio, ()) for layers, seed, ratio in ((34, 0, 4.0), (34, 1, 1.0))
    ]
    rows += [DepthGradient("BSG", True, 10, 0, 0.0, ())]
    found = DepthGradients("digits_narrow", {}, "abc", tuple(rows))
    assert found.ratios() == {("BSG", True): {10: pytest.approx(1e-30)}, ("BSG", False): {34: pytest.approx(2.0)}}
    assert (found.seeds, found.depths) == (2, [10, 34])


def test_depths_are_those_of_two_convolutions_in_a_block() -> None:
    assert all(2 * sum(stages) + 2 == layers for layers, stages in DEPTHS.items())
    assert set(CONNECTIONS.values()) == {"bsg", "add", "iand", "post_add"}
