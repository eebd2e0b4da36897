"""The best versions: from the index where it can answer, else from all versions.

The index (`lookup_index`, `index_search`) is used only while every version is indexed. All versions are read where one
is not, where one that the index proposes was edited since, and where a condition that MLflow cannot compare leaves out
so many that the index would be read nearly whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spikefleet.errors import UserError
from spikefleet.registry.flaws import FLAW
from spikefleet.registry.index_search import IndexUnusableError, search_index
from spikefleet.registry.mlflow_store import aliases_of, find_versions
from spikefleet.registry.query import parse_where, plain_word
from spikefleet.registry.question import Question
from spikefleet.registry.version import SPIKE_DRIVEN, RegisteredVersion
from spikefleet_tune.messages import one_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


def find_best(
    client: MlflowClient, question: Question, announce: Callable[[str], None] | None = None
) -> list[RegisteredVersion]:
    """The best versions, the best first; of equal ones a champion, else the oldest.

    Args:
        client: of the registry.
        question: what is asked.
        announce: called with the reason, in one line, where all versions are read.

    Raises:
        UserError: the condition names an unknown key, or no version matches.
        MlflowException: the registry fails.
    """
    try:
        return sorted(_with_aliases(client, search_index(client, question), question), key=question.order)[
            : question.top
        ]
    except IndexUnusableError as error:
        reason = str(error)
    if announce is not None:
        announce(f"reading all versions: {reason}")
    words = {key: value for key, value in question.narrowed().items() if plain_word(value)}
    versions = find_versions(client, tags=words) or find_versions(client)  # all of them, for the message
    return sorted(_matching(versions, question), key=question.order)[: question.top]


def _with_aliases(
    client: MlflowClient, versions: Sequence[RegisteredVersion], question: Question
) -> list[RegisteredVersion]:
    """Those that may be among the best, with their aliases: a champion comes before those that are as good."""
    last = sorted(versions, key=question.order)[: question.top][-1]
    kept = [version for version in versions if question.order(version)[0] <= question.order(last)[0]]
    aliases = aliases_of(client, {version.name for version in kept})
    return [replace(version, aliases=aliases.get((version.name, version.version), ())) for version in kept]


def _matching(versions: Sequence[RegisteredVersion], question: Question) -> list[RegisteredVersion]:
    """Those of all versions that match and have the metric. Raises UserError, with what there is, if there are none."""
    for key, wanted in question.narrowed().items():
        versions = _narrow(versions, key, wanted)
    if not (unflawed := [version for version in versions if FLAW not in version.tags]):
        raise UserError(f"every matching version has a flaw; of {versions[0].uri}: {versions[0].tags[FLAW]}")
    if not (taken := [version for version in unflawed if question.trusts(version)]):
        raise UserError(
            "no matching version is proved to be spike-driven, and none is without spikes; "
            f"{unflawed[0].uri} has the verdict {unflawed[0].tags.get(SPIKE_DRIVEN, 'none')!r}; to see such versions, "
            "ask with --any-proof (in Python, any_proof=True)"
        )
    if question.where is not None:
        query = parse_where(question.where, {key for version in taken for key in version.metadata()})
        taken = [version for version in taken if query.holds(version.metadata())]
        if not taken:
            raise UserError(f"no version for task {question.task!r} satisfies where {question.where!r}")
    if not (measured := [version for version in taken if question.value(version) is not None]):
        known = sorted({name for version in taken for name in version.metrics})
        raise UserError(f"no matching version has the metric {question.metric!r}; {one_of(known)}")
    return measured


def _narrow(versions: Sequence[RegisteredVersion], key: str, wanted: str) -> list[RegisteredVersion]:
    kept = [version for version in versions if version.tags.get(key) == wanted]
    if not kept:
        known = sorted({version.tags[key] for version in versions if key in version.tags})
        raise UserError(f"no version is registered for {key} {wanted!r}; {one_of(known)}")
    return kept
