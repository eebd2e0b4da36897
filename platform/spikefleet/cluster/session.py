"""A Ray session that is quiet, local unless an address is given, and ended by whoever began it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
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
        "RAY_prestart_worker_first_driver": "0",  # Ray Train starts its own; idle ones take seconds of two cores
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(
    address: str | None = None, *, cpus: float = 1, gpus: float = 0, verbose: bool = False, dashboard: bool = False
) -> Iterator[None]:
    """Connects to the cluster at `address` (or RAY_ADDRESS), else starts Ray on this machine; inside one, does nothing.

    `dashboard` starts its process too: a Ray Train run inside of a trial asks it for the state of the cluster.
    Raises UserError when nothing answers at the address, or when there are fewer CPUs or GPUs than asked for.
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
            ray.init(address=address, log_to_driver=verbose, logging_level=level, runtime_env=_network_settings())
        except (ConnectionError, RuntimeError, TimeoutError, OSError) as error:
            raise UserError(f"Ray at {address!r} refused the connection: {_first_line(error)}") from None
    else:
        ray.init(
            address="local",
            log_to_driver=verbose,
            logging_level=level,
            include_dashboard=dashboard,
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    # The raylet's own words about a dead worker pass by log_to_driver; the run says in a line what happened.
    ray._private.worker._worker_logs_enabled = verbose
    try:
        where = "the cluster" if address else "Ray here"
        _refuse_too_little(ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}, where)
        yield
    finally:
        ray.shutdown()


_NEED = {"CPU": "cluster.workers x cluster.cpus_per_worker", "GPU": "one for each of cluster.workers"}


def _refuse_too_little(present: Mapping[str, float], needed: Mapping[str, float], where: str) -> None:
    """Ray would wait for ever for what is not there."""
    for kind, amount in needed.items():
        if amount > present.get(kind, 0):
            raise UserError(
                f"{amount:g} {kind}s are needed ({_NEED[kind]}), "
                f"{where} has {present.get(kind, 0):g}; lower --workers"
                + (" or leave out --gpu" if kind == "GPU" else " or cluster.cpus_per_worker")
                + ", or give the --address of a larger cluster"
            )


def _network_settings() -> dict[str, dict[str, str]]:
    """What this process has been told about network interfaces (GLOO_SOCKET_IFNAME and the like), for all workers."""
    return {"env_vars": {key: value for key, value in os.environ.items() if key.startswith(("GLOO_", "NCCL_"))}}


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
