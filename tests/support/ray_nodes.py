"""What Ray says of the hosts of a cluster, for tests in which none runs."""

from __future__ import annotations

from collections.abc import Container
from typing import Any


def nodes(names: str, alive: Container[str], cpus: float) -> list[dict[str, Any]]:
    """The answer of `ray.nodes()`.

    Args:
        names: a letter for each host; the first has the address 10.0.0.1.
        alive: names of those that live.
        cpus: of each host.
    """
    return [
        {
            "NodeID": name,
            "Alive": name in alive,
            "NodeManagerAddress": f"10.0.0.{number}",
            "Resources": {"CPU": cpus},
        }
        for number, name in enumerate(names, 1)
    ]
