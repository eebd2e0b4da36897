"""Descriptions on the pages of versions and models: the card and, of a champion, since when and why it is one.

What was inspected has a link to its page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from spikefleet.registry.model_card import card_heading, fitted_description
from spikefleet.status import one_line
from spikefleet.tracking.mlflow_pages import artifact_link, model_version_link, without_link_targets

if TYPE_CHECKING:
    from mlflow import MlflowClient

INSPECTION: Final = "inspection"
"""Tag of a version: where the page of `spikefleet inspect` is, as `runs:/RUN/PATH`."""

_EXPERIMENT = "experiment"  # no tag: looked up
_PLACE = re.compile(r"runs:/(?P<run>[0-9a-f]{32})/(?P<path>[\w./-]{1,300})", re.ASCII)
_FIRST_SECTION = "## "


def describe_champion(client: MlflowClient, name: str, version: int, before: int | None = None) -> None:
    """Updates the descriptions after a change of the champion. What a person wrote stays. Raises MlflowException.

    Args:
        client: of the registry.
        name: of the registered model.
        version: the champion; its description becomes that of the model too.
        before: the earlier champion, of which may be said that it was rolled back.
    """
    heading = card_heading(name)
    if before is not None and before != version:
        describe_version(client, name, before)
    text = describe_version(client, name, version)
    shown = client.get_registered_model(name).description
    if text.startswith(heading) and (not shown or shown.startswith(heading)):
        client.update_registered_model(name, description=text)


def describe_version(client: MlflowClient, name: str, version: int) -> str:
    """Writes what the tags of a version say of its promotion into its description, and returns the description."""
    held = client.get_model_version(name, str(version))
    text = held.description or ""
    if not text.startswith(card_heading(name)):
        return text
    tags = dict(held.tags)
    if INSPECTION in tags:
        tags[_EXPERIMENT] = client.get_run(held.run_id).info.experiment_id
    changed = with_promotion(text, name, tags)
    if changed != text:
        client.update_model_version(name, str(version), description=changed)
    return changed


def with_promotion(card: str, name: str, tags: Mapping[str, str]) -> str:
    """A card with what tags say of the version's promotion, below its heading.

    Args:
        card: the card, or an earlier result.
        name: of the registered model.
        tags: of the version: promoted_at, promoted_by, promoted_because, previous_champion, rolled_back, inspection;
            and "experiment", the id of its run's experiment, for the link to the page of `spikefleet inspect`.
    """
    heading = card_heading(name)
    sections = card.find(f"\n{_FIRST_SECTION}")
    body = card[len(heading) :] if sections < 0 else card[sections + 1 :]
    said = "".join(f"{sentence}\n\n" for sentence in _promotion(name, tags))
    return fitted_description(f"{heading}\n{said}{body.lstrip()}")


def _promotion(name: str, tags: Mapping[str, str]) -> Iterator[str]:
    if because := tags.get("promoted_because"):
        at = tags.get("promoted_at", "").replace("T", " ").removesuffix("+00:00")
        by = f" by {_plain(tags['promoted_by'])}" if tags.get("promoted_by") else ""
        before = tags.get("previous_champion", "")
        instead = f", in place of {model_version_link(name, int(before))}" if before.isdecimal() else ""
        yield f"**Became champion**{f' on {_plain(at)} UTC' if at else ''}{by}{instead}: {_plain(because)}."
    if why := tags.get("rolled_back"):
        yield f"**Rolled back**, and no more champion: {_plain(why)}."
    place, experiment = _PLACE.fullmatch(tags.get(INSPECTION, "")), tags.get(_EXPERIMENT, "")
    if place is not None and experiment.isdecimal():
        link = artifact_link("the page of its measurements", experiment, place["run"], place["path"])
        yield f"**Inspected**: {link}."


def _plain(text: str) -> str:
    return without_link_targets(one_line(text))
