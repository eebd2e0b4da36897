"""Which images are train, val and test where a data set does not say it: groups, and held-out training images.

One rule for all sources of anybody's images that have `OwnSplits` as options. Given splits are kept. Where no val split
is given, a part of the training images becomes val: of each class the same fraction, and images of a group (of one
patient, one place, one video) stay together. Without a test split, "test" is an alias of "val".
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from spikefleet_pipelines.errors import SourceError
from spikefleet_pipelines.sources.own_splits_config import DEFAULT_HOLDOUT, OwnSplits
from spikefleet_pipelines.store.splitting import choose_part

STAND_INS = {"test": "val"}

_DIGEST_BYTES = 16


class Images(Protocol):
    """The images of a split."""

    def __len__(self) -> int: ...

    def select(self, rows: NDArray[np.int64]) -> Self:
        """Return the images at `rows`."""
        ...


Part = TypeVar("Part", bound=Images)


def divide_splits(
    source: str,
    given: Mapping[str, Part],
    strata: NDArray[np.int64],
    groups: Mapping[str, Sequence[str]],
    options: OwnSplits,
    seed: int,
    grouped: bool | None = None,
) -> dict[str, Part]:
    """Hold out a part of train for val, where no val split is given or a holdout is asked for.

    Args:
        source: name, for messages.
        given: images of each split that the data set has; "train" is among them.
        strata: class of each training image, [n]; of several classes, one.
        groups: for each split, the group of each image; `group_names` makes them.
        options: the holdout.
        seed: of the choice, which depends on the names of the groups and not on their order.
        grouped: whether the groups were asked for, so that none may be in two splits; None: by the options.

    Returns:
        The images of train, val and test, as far as there are any.

    Raises:
        SourceError: the training images cannot be divided, or a holdout is asked for although val and test are given.
    """
    if grouped or (grouped is None and options.group is not None):
        _refuse_shared_groups(source, groups)
    holdout = options.holdout
    if holdout is None:
        holdout = 0.0 if "val" in given else DEFAULT_HOLDOUT
    if not holdout:
        return dict(given)
    if {"val", "test"} <= set(given):
        raise SourceError(
            f"source {source!r}: option holdout={holdout:g}, but the data set has val and test splits; remove holdout, "
            "or one of the two"
        )
    train = given["train"]
    digests = _digests(groups["train"])
    chosen = choose_part(digests, strata, holdout, seed, least=1)
    if not chosen.any() and _of_several_classes(groups["train"], strata):
        strata = np.zeros(len(train), np.int64)  # a video is more than the part of one class: a part of all images
        chosen = choose_part(digests, strata, holdout, seed, least=1)
    if not chosen.any():
        what = "the images" if not strata.any() else "a class"
        least = _least_holdout(groups["train"], strata)
        enough = "" if least is None else f"set option holdout to {least:.2f} or more, or "
        raise SourceError(
            f"source {source!r}: the {len(train):,} training images are {len(set(groups['train'])):,} groups, of which "
            f"none is within {holdout:.2%} of {what}; {enough}give a val split"
        )
    divided = {"train": train.select(np.flatnonzero(~chosen)), "val": train.select(np.flatnonzero(chosen))}
    reported = given.get("test", given.get("val"))
    return divided if reported is None else {**divided, "test": reported}


def group_names(source: str, names: Sequence[str], pattern: str | None) -> list[str]:
    """Return the group of each image: what a pattern finds in its name, or, without a pattern, the name.

    Args:
        source: name, for messages.
        names: paths of the images below the root, with `/`.
        pattern: regular expression that is searched in a name; its first group, or all of it, is the image's group.

    Raises:
        SourceError: a name does not match.
    """
    if pattern is None:
        return list(names)
    found = []
    for name in names:
        match = re.search(pattern, name)
        if match is None:
            raise SourceError(
                f"source {source!r}: option group={pattern!r} is not found in the name of image {name!r}; write a "
                "pattern that all names match"
            )
        found.append((match[1] if match.re.groups else match[0]) or "")
    return found


def _of_several_classes(groups: Sequence[str], strata: NDArray[np.int64]) -> bool:
    """Whether a group has images of several strata."""
    return len(set(zip(groups, strata.tolist(), strict=True))) > len(set(groups))


def _least_holdout(groups: Sequence[str], strata: NDArray[np.int64]) -> float | None:
    """The fraction from which on a group can be held out, rounded up; None where each is all of its stratum."""
    sizes, first = Counter(groups), dict(zip(reversed(groups), reversed(strata.tolist()), strict=True))
    totals = Counter(first[group] for group in groups)
    shares = [sizes[group] / totals[first[group]] for group in sizes if sizes[group] < totals[first[group]]]
    return math.ceil(100 * min(shares)) / 100 if shares else None


def _refuse_shared_groups(source: str, groups: Mapping[str, Sequence[str]]) -> None:
    splits = list(groups)
    for position, split in enumerate(splits):
        for other in splits[position + 1 :]:
            if shared := sorted(set(groups[split]) & set(groups[other])):
                raise SourceError(
                    f"source {source!r}: group {shared[0]!r} has images in {split} and in {other} ({len(shared)} "
                    "groups do); move them into one split, or remove option group"
                )


def _digests(names: Sequence[str]) -> list[bytes]:
    return [
        hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=_DIGEST_BYTES).digest() for name in names
    ]
