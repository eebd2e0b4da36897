"""Ray for the modules of the group `ray`, which pytest-xdist keeps in one process and one after the other."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_ray_elsewhere(request: pytest.FixtureRequest) -> None:
    """Ray that a module of the group has left running is ended for a module that is not of it."""
    group = request.node.get_closest_marker("xdist_group")
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and (group is None or group.args != ("ray",)):
        ray.shutdown()
