"""One job at a time changes the aliases of a registered model, or retrains it, wherever the jobs were started.

MLflow's tags have no compare-and-set, but the name of a registered model is unique: who creates the model
`spikefleet-lease.PURPOSE.NAME` holds the lease, and deletes it to release it. A tag of it says who holds it until when;
a thread renews it every minute. A lease is taken over ten minutes after it ran out, or at once if its holder was a
process of this machine that is gone. Of several jobs that take the same lease over, one creates the model that names
the lease's id; the others see another id when they look again.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from spikefleet.errors import RunError, UserError
from spikefleet.registry.mlflow_store import connect
from spikefleet.status import Announce, silent

if TYPE_CHECKING:
    from mlflow import MlflowClient

Purpose = Literal["promotion", "retraining"]

RENEW_EVERY_S: Final = 60.0
"""Seconds between two renewals."""

VALID_S: Final = 120.0
"""A renewal holds for so many seconds."""

TAKEN_OVER_AFTER_S: Final = 600.0
"""Seconds after its end in which nobody takes a lease over: clocks of hosts differ, and requests can be slow."""

PATIENCE_S: Final = 900.0
"""Seconds to wait for another holder: longer than a killed one of another host keeps the lease."""

_TAG = "spikefleet.lease"
_RENEWED = "spikefleet.lease.until."
_LONGEST_PAUSE_S = 5.0


class LeaseHeldError(UserError):
    """Another job holds the lease; `who` describes it."""

    def __init__(self, name: str, purpose: Purpose, record: _Record | None) -> None:
        self.who = "another job" if record is None else record.who
        what = "retrained" if purpose == "retraining" else "promoted"
        super().__init__(
            f"model {name} is being {what} by {self.who}; try again when it has ended (a holder that is gone keeps the "
            f"lease for {(VALID_S + TAKEN_OVER_AFTER_S) / 60:.0f} minutes at most; "
            f"the registered model {lease_key(name, purpose)} stands for it)"
        )


class LeaseLostError(RunError):
    """The lease was taken over, since this process did not renew it in time."""


@dataclass(frozen=True)
class _Record:
    """The tag of a lease."""

    id: str
    label: str
    """What holds it, in words, such as the id of a retraining."""
    host: str
    process: int
    place: str
    """Boot, process namespace and start time of the process: what tells its number from another one's."""
    since: float
    """Time of the acquisition, in seconds of the epoch."""
    expires: float
    """Time at which it runs out, in seconds of the epoch."""

    @property
    def who(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.since))
        return f"{self.label} (process {self.process} on {self.host}, since {started} UTC)"

    @property
    def is_free(self) -> bool:
        """Whether another job may take the lease over."""
        return time.time() > self.expires + TAKEN_OVER_AFTER_S or _is_gone(self)

    @classmethod
    def parse(cls, tags: Mapping[str, str]) -> _Record | None:
        """The record in the tags of a model; None where there is none, or no sound one."""
        try:
            plain = json.loads(tags.get(_TAG, ""))
            return cls(
                str(plain["id"]),
                str(plain["label"]),
                str(plain["host"]),
                int(plain["process"]),
                str(plain["place"]),
                float(plain["since"]),
                float(tags.get(_RENEWED + plain["id"], plain["expires"])),
            )
        except (ValueError, TypeError, KeyError):
            return None


class Lease:
    """A held lease.

    Args:
        client: of the registry.
        key: name of the registered model that stands for the lease.
        record: of this holder.
    """

    def __init__(self, client: MlflowClient, key: str, record: _Record) -> None:
        self._client, self._key, self._record = client, key, record
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew_often, name="lease", daemon=True)
        self._thread.start()

    @property
    def id(self) -> str:
        """Identifies this holding of the lease."""
        return self._record.id

    def check(self) -> None:
        """Call right before a change that needs the lease. Raises LeaseLostError if another job has taken it over."""
        found = _read(self._client, self._key)
        if found is not None and found.id == self.id and time.time() > found.expires:
            self._renew()  # the process was suspended, or the server away: others may be about to take it over
            found = _read(self._client, self._key)
        if found is None or found.id != self.id:
            raise LeaseLostError(
                f"the lease {self._key} was lost: this process did not renew it in time, and "
                f"{'nobody' if found is None else found.who} has it now; nothing was changed; run the same command "
                "again"
            )

    def release(self) -> None:
        """Gives the lease back, unless another job has taken it over."""
        from mlflow.exceptions import MlflowException

        self._over.set()
        self._thread.join()
        with suppress(MlflowException):  # it runs out by itself
            found = _read(self._client, self._key)
            if found is not None and found.id == self.id:
                self._client.delete_registered_model(self._key)

    def _renew_often(self) -> None:
        while not self._over.wait(RENEW_EVERY_S):
            with suppress(Exception):  # a server that is away: the next renewal comes in time, or `check` complains
                self._renew()

    def _renew(self) -> None:
        found = _read(self._client, self._key)
        if found is not None and found.id == self.id:
            # A tag of its own, so that a renewal never overwrites another holder that came in between.
            self._client.set_registered_model_tag(self._key, _RENEWED + self.id, str(time.time() + VALID_S))


@contextmanager
def lease(
    client: MlflowClient,
    name: str,
    purpose: Purpose,
    label: str,
    *,
    patience_s: float = PATIENCE_S,
    announce: Announce = silent,
) -> Iterator[Lease]:
    """Holds the lease of a registered model while the block runs.

    Args:
        client: of the registry.
        name: of the registered model.
        purpose: what it is held for; leases of different purposes exclude nobody of the other.
        label: what holds it, in words, for those who wait.
        patience_s: seconds to wait for another holder.
        announce: called with what is waited for.

    Raises:
        LeaseHeldError: another job still holds it after `patience_s`.
        MlflowException: the registry fails.
    """
    held = Lease(client, lease_key(name, purpose), _acquire(client, name, purpose, label, patience_s, announce))
    try:
        yield held
    finally:
        held.release()


@contextmanager
def registry_lease(
    uri: str, name: str, purpose: Purpose, label: str, patience_s: float = PATIENCE_S, announce: Announce = silent
) -> Iterator[Lease]:
    """As `lease`, for a block whose errors are not the registry's.

    Args:
        uri: of the registry.
        name: of the registered model.
        purpose: what it is held for.
        label: what holds it, in words.
        patience_s: seconds to wait for another holder.
        announce: called with what is waited for.

    Raises:
        UserError: another job still holds it after `patience_s`, or the registry fails.
    """
    with ExitStack() as held:
        with connect(uri) as client:
            mine = held.enter_context(lease(client, name, purpose, label, patience_s=patience_s, announce=announce))
        yield mine


def lease_key(name: str, purpose: Purpose) -> str:
    """Name of the registered model that stands for a lease."""
    return f"spikefleet-lease.{purpose}.{name}"


def holder_of(client: MlflowClient, name: str, purpose: Purpose) -> str | None:
    """Who holds a lease, in words; None if it is free."""
    found = _read(client, lease_key(name, purpose))
    return None if found is None or found.is_free else found.who


def _acquire(
    client: MlflowClient, name: str, purpose: Purpose, label: str, patience_s: float, announce: Announce
) -> _Record:
    give_up, pause, jitter = time.monotonic() + patience_s, 0.1, random.Random()
    while True:
        try:
            return _attempt(client, name, purpose, label)
        except LeaseHeldError as error:
            left = give_up - time.monotonic()
            if left <= 0:
                raise
            announce(f"waiting for {error.who}")
        time.sleep(min(left, pause * jitter.uniform(0.5, 1.0)))
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)


def _attempt(client: MlflowClient, name: str, purpose: Purpose, label: str) -> _Record:
    """Acquires the lease now. Raises LeaseHeldError."""
    key, now = lease_key(name, purpose), time.time()
    mine = _Record(uuid.uuid4().hex, label, socket.gethostname(), os.getpid(), _place(), now, now + VALID_S)
    if _create(client, key, mine):
        return mine
    found = _read(client, key)
    if found is None and _create(client, key, mine):  # it was released just then
        return mine
    if found is None or not found.is_free:
        raise LeaseHeldError(name, purpose, found)
    made: list[str] = []
    try:
        while True:
            claim = f"{key}.after-{found.id}.{len(made) + 1}"
            made.append(claim)
            if _create(client, claim, mine):
                break
            other = _read(client, claim)
            if other is None or not other.is_free:
                made.clear()
                raise LeaseHeldError(name, purpose, other)
        current = _read(client, key)
        if current is None or current.id != found.id or not current.is_free:  # another job was faster, or it is back
            del made[:-1]
            raise LeaseHeldError(name, purpose, current)
        client.set_registered_model_tag(key, _TAG, json.dumps(asdict(mine)))
        return mine
    finally:
        for claim in made:
            _delete(client, claim)


def _create(client: MlflowClient, key: str, record: _Record) -> bool:
    """Creates the model of a lease or a claim, whose name is unique. Returns whether it is new."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            key, tags={_TAG: json.dumps(asdict(record))}, description="A lock of spikefleet; it is removed by itself."
        )
    except MlflowException as error:
        # MLflow looks at the model that has the name, which may be released just then.
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            raise
        return False
    return True


def _read(client: MlflowClient, key: str) -> _Record | None:
    from mlflow.exceptions import MlflowException

    try:
        return _Record.parse(client.get_registered_model(key).tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _delete(client: MlflowClient, key: str) -> None:
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):  # removed by another job
        client.delete_registered_model(key)


def _is_gone(record: _Record) -> bool:
    """Whether the holder is known to have ended: it was a process that this one could see."""
    boot, namespace, _ = _parts(record.place)
    here_boot, here_namespace, _ = _parts(_place())
    if not boot or record.host != socket.gethostname() or (boot, namespace) != (here_boot, here_namespace):
        return False
    return _start_of(record.process) != _parts(record.place)[2] and not _is_hidden(record.process)


def _is_hidden(process: int) -> bool:
    """Whether a process exists of which /proc shows nothing, as with the mount option hidepid."""
    if _start_of(process):
        return False
    try:
        os.kill(process, 0)
    except PermissionError:  # of another user
        return True
    except (OSError, OverflowError):
        pass
    return False


def _place() -> str:
    """Boot, process namespace and start time of this process; parts are empty where the system does not say."""
    boot, namespace = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return f"{boot} {namespace} {_start_of(os.getpid())}"


def _parts(place: str) -> tuple[str, str, str]:
    parts = place.split(" ")
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else ("", "", "")


def _start_of(process: int) -> str:
    """Start time of a process in clock ticks since the boot; empty if there is none."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        fields = status.rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # field 22 of proc(5)
