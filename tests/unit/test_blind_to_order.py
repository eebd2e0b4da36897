"""The networks of the built-in recipes, at T=1 or without memory, answer twins alike: they are right for half at most.

That holds for all weights, so it needs no training; `tests/bench/events_need_time.py` measures it after trainings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spikefleet.config.recipes import load_config
from spikefleet_models.families import build_model
from spikefleet_pipelines.events.representations import bin_events
from spikefleet_pipelines.events.twins import ApparentMotion, FirstDigit
from spikefleet_pipelines.events.windows import recording_of
from spikefleet_pipelines.sources.digits import read_digits
from spikefleet_pipelines.sources.digits_config import DigitsOptions
from spikefleet_pipelines.transforms.events_config import EventsTransformConfig

TWINS = 2
STATELESS = {"neuron": {"kind": "ilif", "bound": 1, "leak": 0.0}, "decoder": "rate"}
RECIPES: dict[str, type[FirstDigit | ApparentMotion]] = {
    "first_digit_7bnet": FirstDigit,
    "apparent_motion_7bnet": ApparentMotion,
}


@pytest.fixture(scope="module", params=RECIPES)
def twins(request: pytest.FixtureRequest) -> tuple[str, FirstDigit | ApparentMotion, list[Any]]:
    task = RECIPES[request.param](read_digits(None, DigitsOptions(), 0).splits)
    return request.param, task, task.samples("test", range(2 * TWINS))


def frames_of(task: FirstDigit | ApparentMotion, samples: list[Any], transform: EventsTransformConfig) -> Tensor:
    """Frames [T, B, C, H, W] of whole recordings, as the recipe bins them; rows 2 k and 2 k + 1 are twins."""
    windows = [recording_of(events, task.sensor).window(0, task.duration_us) for events, _ in samples]
    return torch.from_numpy(np.stack([bin_events(one, transform.binning) for one in windows], 1)).double()


def network_of(recipe: str, changes: dict[str, Any]) -> tuple[nn.Module, EventsTransformConfig]:
    config = load_config(recipe)
    model = config.model.model_validate({**config.model.model_dump(), **changes})
    transform = config.data.transform
    assert isinstance(transform, EventsTransformConfig)
    torch.manual_seed(0)
    return build_model(model).double(), transform.for_timesteps(model.timesteps)


@pytest.mark.parametrize(("changes", "blind"), [({"timesteps": 1}, True), (STATELESS, True), ({}, False)])
def test_twins_get_the_same_answer(
    twins: tuple[str, FirstDigit | ApparentMotion, list[Any]], changes: dict[str, Any], blind: bool
) -> None:
    recipe, task, samples = twins
    network, transform = network_of(recipe, changes)
    frames = frames_of(task, samples, transform)
    with torch.no_grad():
        network(frames)  # statistics of batch norm, so that neurons fire
        answers = network.eval()(frames)
    one, twin = answers[::2], answers[1::2]
    assert answers.std(0).max() > 1e-3, "it answers the same whatever it sees, so this shows nothing"
    assert torch.allclose(one, twin, rtol=0, atol=1e-9) == blind
    if blind:
        labels = torch.tensor([label for _, label in samples])
        assert (answers.argmax(1) == labels).double().mean() <= 0.5
