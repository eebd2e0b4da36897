"""Errors that a user can fix; the message names the field or file, the value, what is allowed and what to do."""

from __future__ import annotations


class SearchError(ValueError):
    """A search that cannot start as it is written or requested."""


class WaitedTooLong(SearchError):  # noqa: N818  # one of the things that end a search
    """The search has waited for hosts for longer than it may; run again, it resumes."""
