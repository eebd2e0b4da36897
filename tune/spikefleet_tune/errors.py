"""Errors that a user can fix; the message names the field or file, the value, what is allowed and what to do."""

from __future__ import annotations


class SearchError(ValueError):
    """A search that cannot start as it is written or requested."""
