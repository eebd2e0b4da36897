"""Which tensors of trained weights another network takes, and which values it refuses."""

from __future__ import annotations

import pytest
import torch

from spikefleet.errors import UserError
from spikefleet.training.fine_tuning import fit_weights

NETWORK = {"conv.weight": torch.zeros(2, 3), "bn.num_batches_tracked": torch.zeros((), dtype=torch.int64)}


def given(value: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.full((2, 3), value, dtype=dtype)}


@pytest.mark.parametrize("value", [1e300, float("inf"), float("nan")])
def test_values_that_are_not_finite_in_the_network_are_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"tensor conv.weight has values that are not finite; use other weights"):
        fit_weights(NETWORK, given(value, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_other_types_become_that_of_the_network(dtype: torch.dtype) -> None:
    found = fit_weights(NETWORK, given(0.5, dtype))
    assert found.taken["conv.weight"].dtype == torch.float32
    assert torch.equal(found.taken["conv.weight"], torch.full((2, 3), 0.5))
    assert found.anew == ("bn.num_batches_tracked [] (not there)",)
