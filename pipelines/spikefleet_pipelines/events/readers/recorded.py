"""How the files of a source were read: what recordings of the same kind need again, and do not say themselves."""

from collections.abc import Mapping

_OF_FILES = ("columns", "time", "y_axis", "evt21")
"""Options of the readers that are about what a file means, not about what becomes of its flaws."""
_USUAL = {"columns": "", "time": "us", "y_axis": "down"}
_OF_SOURCES: Mapping[str, Mapping[str, str]] = {"asl_dvs": {"y_axis": "up"}}


def options_of_files(source: str, options: Mapping[str, object]) -> dict[str, str]:
    """Return the options of `events/readers` that the files of a store were read by, but for defaults.

    Args:
        source: its name.
        options: that the store was prepared with.
    """
    given = {name: str(options[name]) for name in _OF_FILES if options.get(name) is not None}
    chosen = {name: value for name, value in given.items() if value != _USUAL.get(name)}
    return {**_OF_SOURCES.get(source, {}), **chosen}
