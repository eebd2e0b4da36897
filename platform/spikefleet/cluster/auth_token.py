"""The token of a Ray cluster: that there is one, and that the cluster takes it, before Ray waits for a minute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spikefleet.errors import UserError


def check_token_is_there() -> None:
    """Raises UserError where RAY_AUTH_MODE=token has no token to send. Needs no import of Ray."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if not path.is_file():
        where = f"RAY_AUTH_TOKEN_PATH={named} is no file" if named else f"no token is in {path}"
        raise UserError(
            f"RAY_AUTH_MODE=token, but {where}; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
        )


def refused_token(address: str) -> str:
    """The sentence for a token that is wrong or missing."""
    given = os.environ.get("RAY_AUTH_MODE", "")
    mode = f" (RAY_AUTH_MODE={given})" if given and given != "token" else ""
    return (
        f"the Ray cluster at {address} refused the token{mode}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH to the cluster's"
    )


def check_token(address: str) -> None:
    """Asks the cluster for its id, which takes a second; ray.init would ask for a minute, with a line each second.

    Args:
        address: HOST:PORT of the cluster.

    Raises:
        UserError: it refuses the token.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RayError

    with _native_lines_hidden():
        try:
            GcsClient(address=address)
        except AuthenticationError:
            raise UserError(refused_token(address)) from None
        except (RayError, RuntimeError, OSError):
            return  # ray.init finds the same, and says more


@contextmanager
def _native_lines_hidden() -> Iterator[None]:
    """Hides what Ray's C++ writes to the terminal while the block runs: the exception says the same."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
