"""The split that the name of a shard says: `train-00000-of-00002.parquet`, `set-val-000012.tar`, `test/0000.tar`."""

import re
from pathlib import Path

from spikefleet_pipelines.sources.own_splits_config import SPLIT_FOLDERS

_SPLIT_OF = {name: split for split, names in SPLIT_FOLDERS.items() for name in (*names, f"{split}ing", f"{split}s")}
_WORDS = re.compile(r"[^a-z0-9]+")


def split_of(root: Path, path: Path) -> str | None:
    """Return the split of a file below a directory: by its name, else by the folder that is nearest; None if none says.

    A word of the name is meant, between characters that are no letters or digits: `constraint.tar` is not train.
    """
    below = path.relative_to(root)
    for part in (below.stem, *reversed(below.parts[:-1])):
        for word in _WORDS.split(part.casefold()):
            if word in _SPLIT_OF:
                return _SPLIT_OF[word]
    return None


def by_split(root: Path, paths: list[Path]) -> dict[str, list[Path]]:
    """Return the files of each split, in the order of their paths; files that say no split are of train."""
    found: dict[str, list[Path]] = {}
    for split in ("train", "val", "test"):
        if of_split := [path for path in sorted(paths) if (split_of(root, path) or "train") == split]:
            found[split] = of_split
    return found
