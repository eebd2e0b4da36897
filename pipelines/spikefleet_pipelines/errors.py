"""What goes wrong with data: the two errors whose sentences reach the user."""


class SourceError(ValueError):
    """Raw data is missing, damaged, or not what the source expects; or there is no such source or option."""


class StoreError(ValueError):
    """A store, or a part of one, is missing, damaged or not what was asked for."""
