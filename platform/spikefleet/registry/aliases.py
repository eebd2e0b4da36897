"""Which version has which alias: promotion to champion, and what keeps a version from an alias."""

from dataclasses import dataclass

from spikefleet.errors import UserError
from spikefleet.registry.flaws import FLAW
from spikefleet.registry.mlflow_store import connect, find_model, set_alias
from spikefleet.registry.package_access import registry_uri
from spikefleet.registry.promotion import Alias, Candidate, Mode, barred, decide, winner_of
from spikefleet.registry.version import CHALLENGER, CHAMPION, SPIKE_DRIVEN, RegisteredVersion
from spikefleet_tune.messages import one_of

_PROMOTION = "spikefleet.promotion"  # tag of a version that requests, or has requested, to become champion


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


def promote(name: str, version: int, metric: str, mode: Mode = "max", *, tracking_uri: str | None = None) -> Promotion:
    """Gives a version the alias `champion` if its metric is better than that of the champion, else `challenger`.

    A version with a flaw (`flaws`), or of which the spike check shows nothing, gets no alias; one that was registered
    without a verdict of it becomes no champion.

    Several jobs may promote concurrently. Each tags its version as requesting, and after every change of the alias
    reads all versions that requested since. When all calls have returned, the champion is the best of them and of the
    earlier champion; before that, and after a killed call, it may be a worse one, until the next call. An alias that
    is moved by hand at the same moment may be moved back.

    Args:
        name: of the registered model.
        version: number of the version.
        metric: full name, such as "val/top1".
        mode: `max` or `min`.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Returns:
        The alias that the version got, the reason, and the current champion.

    Raises:
        UserError: the version does not exist, or lacks the metric.
    """
    with connect(registry_uri(tracking_uri)) as client:
        before = find_model(client, name)
        candidate = before.pick(version)
        own = _of(candidate, metric)
        if own.value is None:
            raise UserError(f"{candidate.uri} has no metric {metric!r}; {one_of(candidate.metrics)}")
        asking, settled = f"asking {mode} {metric}", f"settled {mode} {metric}"
        settled_before = {v.version for v in before.versions if v.tags.get(_PROMOTION) == settled}
        client.set_model_version_tag(name, str(version), _PROMOTION, asking)
        while True:
            model = find_model(client, name)
            champion = None if model.champion is None else _of(model.champion, metric)
            asked = [
                v
                for v in model.versions
                if v.tags.get(_PROMOTION) == asking
                or (v.tags.get(_PROMOTION) == settled and v.version not in settled_before)
            ]
            winner = winner_of(champion, [_of(v, metric) for v in asked], metric, mode)
            if winner is None or winner == champion:
                break
            set_alias(client, name, CHAMPION, winner.version)
        won = winner is not None and winner.version == version
        beaten = None if before.champion is None else _of(before.champion, metric)
        decision = decide(beaten if won else winner, own, metric, mode)
        challenger = next((v for v in model.versions if CHALLENGER in v.aliases), None)
        if not won and decision.alias is not None:
            set_alias(client, name, CHALLENGER, version)
        elif challenger is not None and challenger.version == version:
            client.delete_registered_model_alias(name, CHALLENGER)
        client.set_model_version_tag(name, str(version), _PROMOTION, settled)
        return Promotion(name, version, decision.alias, decision.reason, winner.version if winner else None)


def keep_as_challenger(name: str, version: int, reason: str, *, tracking_uri: str | None = None) -> Promotion:
    """Gives a version the alias `challenger` without comparing it, unless it must not have one.

    Args:
        name: of the registered model.
        version: number of the version.
        reason: why it is not compared.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.

    Raises:
        UserError: the version does not exist.
    """
    with connect(registry_uri(tracking_uri)) as client:
        model = find_model(client, name)
        champion = None if model.champion is None else model.champion.version
        refusal = refused_alias(model.pick(version), CHALLENGER)
        if refusal is not None:
            return Promotion(name, version, None, refusal, champion)
        set_alias(client, name, CHALLENGER, version)
        return Promotion(name, version, CHALLENGER, reason, champion)


def refused_alias(version: RegisteredVersion, alias: str) -> str | None:
    """Why a version must not have an alias; None if it may."""
    decision = barred(_of(version, ""))
    if decision is None or (decision.alias is not None and alias != CHAMPION):
        return None
    return decision.reason


def _of(version: RegisteredVersion, metric: str) -> Candidate:
    tags = version.tags
    return Candidate(
        version.version, version.metric(metric), tags.get("data_hash"), tags.get(SPIKE_DRIVEN), tags.get(FLAW)
    )
