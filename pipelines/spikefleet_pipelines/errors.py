"""Errors of data preparation and stores; their messages are shown to the user."""


class SourceError(ValueError):
    """Raw data is missing, damaged, or not what the source expects; or a source or option is unknown."""


class StoreError(ValueError):
    """A store or a part of it is missing, damaged, or not the requested one."""
