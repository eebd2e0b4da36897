"""Ray sessions: local unless an address is given, quiet, and shut down by the code that started them."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from spikefleet.cluster.auth_token import check_token, check_token_is_there
from spikefleet.disks import disk_problem
from spikefleet.errors import RunError, UserError
from spikefleet_tune.interruption import Interrupted, handlers_kept

_CONNECT_TIMEOUT_S = 5.0
_FORWARDED = ("GLOO_", "NCCL_", "SPIKEFLEET_KERNELS", "SPIKEFLEET_WEIGHT_GRADIENTS")
_OBJECT_STORE_BYTES = 200_000_000
"""Size of the object store: only small objects pass through it, since data is memory-mapped from disk."""


def quiet_ray() -> None:
    """Sets defaults of Ray's environment variables; call it before Ray is imported. Values of the user stay."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # delay of reports and failures; 2 s by default
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # or `uv run` builds an environment for each worker
        "RAY_worker_niceness": "0",
        "RAY_prestart_worker_first_driver": "0",  # Ray Train starts its own workers; idle ones cost seconds
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(
    address: str | None = None, *, cpus: float = 1, gpus: float = 0, verbose: bool = False, dashboard: bool = False
) -> Iterator[None]:
    """Connects to a Ray cluster, or starts Ray on this machine; inside another session it does nothing.

    Args:
        address: HOST:PORT of the cluster; by default RAY_ADDRESS, else a local Ray is started.
        cpus: CPUs that the caller needs.
        gpus: GPUs that the caller needs.
        verbose: show the logs of Ray and of its workers.
        dashboard: start the dashboard of a local Ray: a Ray Train run inside a trial reads the cluster state from it.

    Raises:
        UserError: nothing answers at the address, the cluster has too few CPUs or GPUs, or a directory keeps Ray from
            starting.
        RunError: Ray does not start on this machine.
    """
    quiet_ray()
    if not _connected():
        check_address(address)
    import ray

    if ray.is_initialized():
        yield
        return
    refuse_missing_gpus(address, gpus)
    address = address or os.environ.get("RAY_ADDRESS")
    level = "info" if verbose else "error"
    with _signals_of_ray():
        if address:
            if address not in ("auto", "local") and not address.startswith("ray://"):
                check_token(address)
            try:
                ray.init(address=address, log_to_driver=verbose, logging_level=level, runtime_env=_network_settings())
            except (ConnectionError, RuntimeError, TimeoutError, OSError) as error:
                raise UserError(f"Ray at {address!r} refused the connection: {_first_line(error)}") from None
        else:
            try:
                ray.init(
                    address="local",
                    log_to_driver=verbose,
                    logging_level=level,
                    include_dashboard=dashboard,
                    object_store_memory=_OBJECT_STORE_BYTES,
                )
            except Exception as error:  # what keeps Ray's processes from starting has many classes
                with suppress(Exception):
                    ray.shutdown()
                raise _not_started(error) from None
    # log_to_driver does not silence the raylet's messages about a dead worker; the run reports it in one line.
    ray._private.worker._worker_logs_enabled = verbose
    try:
        where = "the cluster" if address else "this machine"
        _refuse_too_little(ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}, where)
        yield
    finally:
        ray.shutdown()


def _connected() -> bool:
    """Whether this process has a session already; Ray is not imported for that."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def check_address(address: str | None) -> None:
    """Checks what can be checked of a cluster before Ray is imported.

    Args:
        address: as for `ray_session`.

    Raises:
        UserError: nothing answers there, or there is no token to send.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _refuse_dead_address(address)
        check_token_is_there()


def _not_started(error: Exception) -> UserError | RunError:
    """The sentence for a local Ray that does not start: cause, figures, remedy."""
    reason = _first_line(error)[:300] or type(error).__name__
    if "AF_UNIX" in reason:
        path = reason.rpartition(": ")[2]
        return UserError(
            f"Ray cannot start: the path of its socket {path} has {len(path.encode())} characters, and 107 are "
            "allowed; set RAY_TMPDIR, or TMPDIR, to a shorter directory such as /tmp"
        )
    if problem := disk_problem(error):
        return UserError(f"Ray cannot start: {problem}, by RAY_TMPDIR or TMPDIR")
    load, cores = os.getloadavg()[0], os.cpu_count()
    return RunError(
        f"Ray did not start on this machine: {reason}; {load:.0f} processes compete for {cores} cores, and "
        f"{_available_memory()} of memory are free; stop other programs and run the same command again, or train "
        "without Ray by --workers 0"
    )


def _available_memory() -> str:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return f"{int(line.split()[1]) / 1e6:.1f} GB"
    return "an unknown amount"


@contextmanager
def _signals_of_ray() -> Iterator[None]:
    """Ray's start replaces the handler of SIGTERM by one that exits; ours is restored, and its exit translated."""
    with handlers_kept():
        try:
            yield
        except SystemExit:
            raise Interrupted(signal.SIGTERM) from None


def refuse_missing_gpus(address: str | None, gpus: float) -> None:
    """Raises UserError where Ray would be started on this machine, which has fewer GPUs: before that takes seconds.

    Args:
        address: of the cluster, as for `ray_session`.
        gpus: GPUs that the caller needs.
    """
    if gpus <= 0 or (address or os.environ.get("RAY_ADDRESS") or "local") != "local":
        return
    import torch

    _refuse_too_little({"GPU": torch.cuda.device_count()}, {"GPU": gpus}, "this machine")


_NEED = {"CPU": "cluster.workers x cluster.cpus_per_worker", "GPU": "one for each of cluster.workers"}


def _refuse_too_little(present: Mapping[str, float], needed: Mapping[str, float], where: str) -> None:
    """Raises UserError for missing resources; Ray itself would wait for them endlessly."""
    for kind, amount in needed.items():
        if amount > present.get(kind, 0):
            remedy = "leave out --gpu or --gpus-per-worker" if kind == "GPU" else "lower cluster.cpus_per_worker"
            units = kind if amount == 1 else f"{kind}s"
            larger = "set --address to a larger cluster"
            if where == "the cluster":
                larger += ", or cluster.autoscaling=true (tune, reproduce: --autoscaling) where hosts will join"
            raise UserError(
                f"the run needs {amount:g} {units} ({_NEED[kind]}), but {where} has {present.get(kind, 0):g}; "
                f"lower --workers, {remedy}, or {larger}"
            )


def _network_settings() -> dict[str, dict[str, str]]:
    """Environment variables for all workers: of GLOO and NCCL (such as GLOO_SOCKET_IFNAME) and of kernels."""
    ours = {key: value for key, value in os.environ.items() if key.startswith(_FORWARDED)}
    return {"env_vars": ours}


def _refuse_dead_address(address: str) -> None:
    """Fails at once for an unreachable address; ray.init would wait for a minute and then exit the process."""
    if address in ("auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise UserError(f"Ray address {address!r} must have the form HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at Ray address {address!r} ({error}); check --address and RAY_ADDRESS, "
            "or leave both out to start Ray on this machine"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
