"""A Ray session that is quiet, local unless an address is given, and ended by whoever began it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from spikefleet.errors import UserError

_CONNECT_TIMEOUT_S = 5.0
_OBJECT_STORE_BYTES = 200_000_000
"""Nothing but small events passes through the object store: the data are memory-mapped from disk."""


def quiet_ray() -> None:
    """Defaults for Ray's switches, before it is imported; whatever the user has set stays."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how fast a report or a death is seen; 2 s by default
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` builds an environment for each worker
        "RAY_worker_niceness": "0",
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(address: str | None = None, *, cpus: float = 1, verbose: bool = False) -> Iterator[None]:
    """Connects to the cluster at `address` (or RAY_ADDRESS), else starts Ray in this machine; inside one, does nothing.

    Raises UserError when nothing answers at the address, or when this machine has fewer CPUs than asked for.
    """
    quiet_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    level = "info" if verbose else "error"
    if address:
        _refuse_dead_address(address)
        try:
            ray.init(address=address, log_to_driver=verbose, logging_level=level)
        except (ConnectionError, RuntimeError, TimeoutError, OSError) as error:
            raise UserError(f"Ray at {address!r} refused the connection: {_first_line(error)}") from None
    else:
        present = os.cpu_count() or 1
        if cpus > present:
            raise UserError(
                f"{cpus:g} CPUs are needed (cluster.workers x cluster.cpus_per_worker), this machine has {present}; "
                "lower --workers or cluster.cpus_per_worker, or give the --address of a cluster"
            )
        ray.init(
            address="local",
            log_to_driver=verbose,
            logging_level=level,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    # The raylet's own words about a dead worker pass by log_to_driver; the run says in a line what happened.
    ray._private.worker._worker_logs_enabled = verbose
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_dead_address(address: str) -> None:
    """ray.init waits a minute for a cluster that is not there, then ends the process; this tells at once."""
    if address in ("auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise UserError(f"Ray address {address!r} is not of the form HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at Ray address {address!r} ({error}); check --address and RAY_ADDRESS, "
            "or leave both out to start Ray on this machine"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
