"""Which version has which alias: promotion to champion, rollback, and what keeps a version from an alias.

Aliases change under the lease of promotion alone (`lease.py`), and each change is recorded (`history.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from spikefleet.errors import UserError
from spikefleet.registry.flaws import FLAW
from spikefleet.registry.history import Action, append_change, load_history, prepare_history
from spikefleet.registry.lease import PATIENCE_S, Lease, lease
from spikefleet.registry.mlflow_store import connect, find_model, set_alias
from spikefleet.registry.package import verify_package
from spikefleet.registry.package_access import package_files, registry_uri
from spikefleet.registry.promotion import Alias, Candidate, Decision, Mode, barred, decide
from spikefleet.registry.version import CHALLENGER, CHAMPION, SPIKE_DRIVEN, RegisteredModel, RegisteredVersion
from spikefleet.registry.version_page import describe_champion
from spikefleet.status import Announce, silent
from spikefleet_tune.messages import one_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREVIOUS: Final = "previous_champion"
"""Tag of a champion: the version that it replaced."""

ROLLED_BACK: Final = "rolled_back"
"""Tag of a version that was champion and is so no more: why."""

_TAG_LENGTH = 4_000


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion."""

    name: str
    version: int
    alias: Alias | None
    """None for a version with a flaw, or of which the spike check shows nothing."""
    reason: str
    champion: int | None
    """The current champion version."""


class AliasChanges:
    """Changes of a model's aliases under the lease of promotion.

    Args:
        client: of the registry.
        held: the lease.
        model: as it is under the lease.
        retraining: id of the retraining that asks for them.

    Raises:
        UserError: the history of the model is damaged.
    """

    def __init__(self, client: MlflowClient, held: Lease, model: RegisteredModel, retraining: str | None) -> None:
        self._client, self._lease, self._retraining = client, held, retraining
        self.model = model
        self._history = load_history(client, model.name)
        prepare_history(client, self._history)
        self._there = {alias: version.version for version in model.versions for alias in version.aliases}
        recorded = self._history.aliases()
        for alias in sorted(recorded.keys() | self._there.keys()):
            if recorded.get(alias) != self._there.get(alias):
                why = "moved by hand, by another program, or by a job that was killed before it recorded the change"
                self._record("found", alias, recorded.get(alias), self._there.get(alias), why)

    def move(self, alias: str, version: int, action: Action, why: str) -> None:
        """Points an alias at a version, unless it does already.

        Raises:
            LeaseLostError: another job has taken the lease over; nothing was changed.
        """
        before = self._there.get(alias)
        if before == version:
            return
        self._refuse_foreign(alias)
        self._lease.check()
        if alias == CHAMPION:
            self._explain(version, before if action == "promoted" else None, why)
        set_alias(self._client, self.model.name, alias, version)
        self._there[alias] = version
        self._record(action, alias, before, version, why)
        if alias == CHAMPION:
            self._show_champion(version, before)

    def remove(self, alias: str, why: str) -> None:
        """Removes an alias from the version that has it. Raises LeaseLostError as `move`."""
        before = self._there.get(alias)
        if before is None:
            return
        self._lease.check()
        self._client.delete_registered_model_alias(self.model.name, alias)
        del self._there[alias]
        self._record("alias removed", alias, before, None, why)

    def tag(self, version: int, key: str, text: str) -> None:
        """Sets a tag of a version."""
        self._client.set_model_version_tag(self.model.name, str(version), key, text[:_TAG_LENGTH])

    def settle(self, version: int, decision: Decision) -> Promotion:
        """Gives a version the alias that was decided; a champion is no challenger any more."""
        if decision.alias == CHAMPION:
            self.move(CHAMPION, version, "promoted", decision.reason)
            if self._there.get(CHALLENGER) == version:
                self.remove(CHALLENGER, f"version {version} is champion")
        elif decision.alias == CHALLENGER and self._there.get(CHAMPION) != version:
            if self._there.get(CHALLENGER) == version:
                self._restate(version, decision.reason)
            self.move(CHALLENGER, version, "kept as challenger", decision.reason)
        return Promotion(self.model.name, version, decision.alias, decision.reason, self._there.get(CHAMPION))

    def _refuse_foreign(self, alias: str) -> None:
        """Raises UserError if a version that spikefleet did not register has the alias: nothing compares with it."""
        target = self._client.get_registered_model(self.model.name).aliases.get(alias)
        if target is not None and int(target) not in {version.version for version in self.model.versions}:
            raise UserError(
                f"version {target} of model {self.model.name} has the alias {alias}, but spikefleet did not register "
                "it, so no version can be compared with it; remove the alias in MLflow, or set another registry.name"
            )

    def _explain(self, version: int, before: int | None, why: str) -> None:
        """Tags a version that becomes champion with who, when and why."""
        texts = {
            "promoted_by": "spikefleet" if self._retraining is None else f"retraining {self._retraining}",
            "promoted_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "promoted_because": why,
        }
        if before is not None:
            texts[PREVIOUS] = str(before)
        if self._retraining is not None:
            texts["retraining"] = self._retraining
        for key, text in texts.items():
            self.tag(version, key, text)

    def _restate(self, version: int, why: str) -> None:
        """Records another reason for which a challenger is kept, such as what the gates say of it."""
        last = next((change for change in reversed(self._history.changes) if change.alias == CHALLENGER), None)
        if last is not None and last.why != why:
            self._lease.check()
            self._record("kept as challenger", CHALLENGER, version, version, why)

    def _show_champion(self, version: int, before: int | None) -> None:
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # a page alone: the alias is moved, and the change of it recorded
            describe_champion(self._client, self.model.name, version, before)

    def _record(self, action: Action, alias: str, before: int | None, after: int | None, why: str) -> None:
        self._history = append_change(self._client, self._history, action, alias, before, after, why, self._retraining)


@contextmanager
def changing_aliases(
    client: MlflowClient,
    name: str,
    label: str,
    *,
    retraining: str | None = None,
    announce: Announce = silent,
    patience_s: float = PATIENCE_S,
) -> Iterator[AliasChanges]:
    """Holds the lease of promotion while the block changes aliases.

    Args:
        client: of the registry.
        name: of the registered model.
        label: what changes them, for those who wait.
        retraining: id of the retraining that asks for it.
        announce: called with what is waited for.
        patience_s: seconds to wait for another job.

    Raises:
        UserError: the model does not exist, its history is damaged, or another job holds the lease.
    """
    find_model(client, name)  # no lease for a model that does not exist
    with lease(client, name, "promotion", label, patience_s=patience_s, announce=announce) as held:
        yield AliasChanges(client, held, find_model(client, name), retraining)


def promote(
    name: str,
    version: int,
    metric: str,
    mode: Mode = "max",
    *,
    tracking_uri: str | None = None,
    announce: Announce = silent,
) -> Promotion:
    """Gives a version the alias `champion` if its metric is better than that of the champion, else `challenger`.

    This plain rule also promotes half of all networks that are only as good; `spikefleet.gates` compares two networks
    on the same images. A version with a flaw (`flaws`), or of which the spike check shows nothing, gets no alias; one
    that was registered without a verdict of it, or was rolled back, becomes no champion.

    Several jobs may promote concurrently: they take turns.

    Args:
        name: of the registered model.
        version: number of the version.
        metric: full name, such as "val/top1".
        mode: `max` or `min`.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.
        announce: called with what is waited for.

    Returns:
        The alias that the version got, the reason, and the current champion.

    Raises:
        UserError: the version does not exist, or lacks the metric, or another job does not end its promotion.
    """

    def by_metric(model: RegisteredModel) -> Decision:
        candidate = candidate_of(model.pick(version), metric)
        champion = None if model.champion is None else candidate_of(model.champion, metric)
        return decide(champion, candidate, metric, mode)

    with connect(registry_uri(tracking_uri)) as client:
        asked = find_model(client, name).pick(version)
        if asked.metric(metric) is None:
            raise UserError(f"{asked.uri} has no metric {metric!r}; {one_of(asked.metrics)}")
    settled = settle(name, version, by_metric, tracking_uri=tracking_uri, announce=announce)
    assert settled is not None, "the rule always decides"
    return settled


def settle(
    name: str,
    version: int,
    rule: Callable[[RegisteredModel], Decision | None],
    *,
    retraining: str | None = None,
    tracking_uri: str | None = None,
    announce: Announce = silent,
) -> Promotion | None:
    """Gives a version the alias that a rule decides, while no other job changes aliases of the model.

    Args:
        name: of the registered model.
        version: number of the version.
        rule: called under the lease with the model as it is then; None: nothing is changed.
        retraining: id of the retraining that asks for it.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.
        announce: called with what is waited for.

    Returns:
        The result; None if the rule decided nothing.

    Raises:
        UserError: the version does not exist, or another job does not end its promotion.
    """
    label = f"the promotion of version {version}" if retraining is None else f"retraining {retraining}"
    with (
        connect(registry_uri(tracking_uri)) as client,
        changing_aliases(client, name, label, retraining=retraining, announce=announce) as aliases,
    ):
        aliases.model.pick(version)
        decision = rule(aliases.model)
        return None if decision is None else aliases.settle(version, decision)


def keep_as_challenger(
    name: str,
    version: int,
    reason: str,
    *,
    retraining: str | None = None,
    tracking_uri: str | None = None,
    announce: Announce = silent,
) -> Promotion:
    """Gives a version the alias `challenger` without comparing it, unless it must not have one.

    Args:
        name: of the registered model.
        version: number of the version.
        reason: why it is not compared.
        retraining: id of the retraining that asks for it.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.
        announce: called with what is waited for.

    Raises:
        UserError: the version does not exist, or another job does not end its promotion.
    """

    def uncompared(model: RegisteredModel) -> Decision:
        refusal = refused_alias(model.pick(version), CHALLENGER)
        return Decision(CHALLENGER, reason) if refusal is None else Decision(None, refusal)

    settled = settle(name, version, uncompared, retraining=retraining, tracking_uri=tracking_uri, announce=announce)
    assert settled is not None, "the rule always decides"
    return settled


def rollback(
    name: str, why: str, to: int | None = None, *, tracking_uri: str | None = None, announce: Announce = silent
) -> Promotion:
    """Makes an earlier version champion again, and keeps the present one from being promoted once more.

    Args:
        name: of the registered model.
        why: the reason, for the history and the tags of both versions.
        to: the version; by default the one that the champion replaced.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.
        announce: called with what is waited for.

    Raises:
        UserError: there is no champion, no version before it, or that version must not be champion or has changed
            files.
    """
    if not why.strip():
        raise UserError("the reason of a rollback is empty; say why, for example --why 'reads 7 as 1 since Monday'")
    place = registry_uri(tracking_uri)
    with connect(place) as client, changing_aliases(client, name, "a rollback", announce=announce) as aliases:
        champion = aliases.model.champion
        if champion is None:
            raise UserError(f"model {name} has no champion to roll back")
        target = aliases.model.pick(_before(champion) if to is None else to)
        if to is None and ROLLED_BACK in target.tags:
            raise UserError(
                f"{champion.uri} replaced version {target.version}, which was rolled back itself: "
                f"{target.tags[ROLLED_BACK]}; name the version with --to"
            )
        if target.version == champion.version:
            raise UserError(f"version {target.version} of model {name} is the champion already; set another --to")
        refusal = barred(candidate_of(target, "", rolled_back=False))
        if refusal is not None:
            raise UserError(f"{target.uri} cannot become champion: {refusal.reason}; set another --to")
        with package_files(target.uri, place) as (directory, content_hash):
            verify_package(directory, content_hash)
        aliases.tag(champion.version, ROLLED_BACK, why)
        if ROLLED_BACK in target.tags:
            client.delete_model_version_tag(name, str(target.version), ROLLED_BACK)
        reason = f"version {champion.version} was rolled back: {why}"
        aliases.move(CHAMPION, target.version, "rolled back", reason)
        if CHALLENGER in target.aliases:
            aliases.remove(CHALLENGER, f"version {target.version} is champion")
        return Promotion(name, target.version, CHAMPION, reason, target.version)


def _before(champion: RegisteredVersion) -> int:
    before = champion.tags.get(PREVIOUS, "")
    if not before.isdecimal():
        raise UserError(
            f"{champion.uri} replaced no champion that is known; name the version with --to (`spikefleet registry show "
            f"{champion.name}` lists them)"
        )
    return int(before)


def refused_alias(version: RegisteredVersion, alias: str) -> str | None:
    """Why a version must not have an alias; None if it may."""
    decision = barred(candidate_of(version, ""))
    if decision is None or (decision.alias is not None and alias != CHAMPION):
        return None
    return decision.reason


def candidate_of(version: RegisteredVersion, metric: str, *, rolled_back: bool = True) -> Candidate:
    """What the rules of promotion look at.

    Args:
        version: the version.
        metric: name of the deciding metric.
        rolled_back: whether an earlier rollback counts.
    """
    tags = version.tags
    return Candidate(
        version.version,
        version.metric(metric),
        tags.get("data_hash"),
        tags.get(SPIKE_DRIVEN),
        tags.get(FLAW),
        tags.get(ROLLED_BACK) if rolled_back else None,
    )
