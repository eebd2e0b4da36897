"""Hosts of a cluster on one machine: network namespaces on a bridge, which containers join."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

BRIDGE = "spikepods"
SUBNET = "10.231.77"


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True)


def address(number: int) -> str:
    """Address of the host of a number, from 1."""
    return f"{SUBNET}.{number}"


@contextmanager
def hosts(names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Namespaces with an interface `eth0` each; yields their addresses. They are removed at the end."""
    remove(names)
    _ip("link", "add", BRIDGE, "type", "bridge")
    try:
        _ip("addr", "add", f"{SUBNET}.254/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for number, name in enumerate(names, 1):
            outside = f"sp{number}"
            _ip("netns", "add", name)
            _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", outside, "master", BRIDGE)
            _ip("link", "set", outside, "up")
            _ip("-n", name, "addr", "add", f"{address(number)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "route", "add", "default", "via", f"{SUBNET}.254")
        yield {name: address(number) for number, name in enumerate(names, 1)}
    finally:
        remove(names)


def remove(names: Sequence[str]) -> None:
    """Remove what an earlier run may have left."""
    for name in names:
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", name)
    with suppress(subprocess.CalledProcessError):
        _ip("link", "del", BRIDGE)
