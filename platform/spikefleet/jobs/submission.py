"""What is submitted: one command of the program, checked here, with what the cluster shows of it."""

from __future__ import annotations

import getpass
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spikefleet.errors import UserError
from spikefleet.versions import code_version, library_versions

ENTRY = "spikefleet.cli.job_entry"
"""Module that a job runs: `python -m` ENTRY SUBMISSION VERSION COMMIT WORDS."""

MARK = "spikefleet"
"""Key of a job's metadata with the version that submitted it; jobs without it are not ours."""

_NAMES = (
    r"(?:password|passwd|secret|token|credentials?|signature|sig|(?:api|access|secret|private)[_-]?key(?:[_-]?id)?)"
)
_ASSIGNED = re.compile(rf"://.*@|(?:^|[._?&;-]){_NAMES}=", re.IGNORECASE)
"""A URI with somebody's name, key or token before an `@`, or a value of a name of secrets."""
_OPTION = re.compile(rf"--?(?:[a-z0-9_]+[_-])*{_NAMES}", re.IGNORECASE)
"""An option whose value, the next word, is a secret."""
_ID_LENGTH = 120


@dataclass(frozen=True)
class Submission:
    """A command to submit."""

    kind: str
    """The command: train, tune, reproduce, retrain, data-prepare or evaluate."""
    run: str
    """What it works on: a run's name, a search's, a table's, a model's, a store's."""
    words: tuple[str, ...]
    """The command as it is typed after `spikefleet`."""
    digest: str
    """Of the configuration, or of the words: what tells another command for the same run apart."""
    recipe: str = ""
    """Recipe of a training; else empty."""
    code: Path | None = field(default=None, compare=False)
    """Directory whose files the job gets as its working directory."""

    @property
    def id(self) -> str:
        """Submission id of the first attempt: it tells kind and run, and stands in a URL."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.kind}-{self.run}").strip("-")[:_ID_LENGTH]

    def metadata(self) -> dict[str, str]:
        """What the cluster shows of the job to everybody who has its token."""
        return {
            MARK: library_versions()["spikefleet"],
            "kind": self.kind,
            "run": self.run,
            "recipe": self.recipe,
            "digest": self.digest,
            "user": _user(),
            "code_version": code_version(),
        }

    def entry_point(self, submission: str) -> str:
        """The shell command of the job.

        Args:
            submission: the id under which it is submitted.
        """
        version, commit = library_versions()["spikefleet"], code_version()
        return shlex.join(["python", "-m", ENTRY, submission, version, commit, *self.words])


def refuse_secrets(words: Sequence[str]) -> None:
    """Raises UserError for words that hold a password: a job's command can be read by all who hold the token."""
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if _ASSIGNED.search(word) or (_OPTION.fullmatch(word) and value):
            shown = re.split(r"=|(?<=://)", word, maxsplit=1)[0]
            raise UserError(
                f"{shown} holds a password, or another secret, and the command of a job is shown to everybody who has "
                "the cluster's token; set it in the environment of the cluster's hosts instead"
            )


def refuse_relative(named: Mapping[str, str | Path | None]) -> None:
    """Raises UserError for a path that would mean another place on the cluster.

    Args:
        named: paths by the option, argument or field that holds them.
    """
    for name, path in named.items():
        if path is not None and "://" not in str(path) and not Path(path).is_absolute():
            raise UserError(
                f"{name} {str(path)!r} is relative to a directory of this machine, and the job runs on the cluster; "
                "give an absolute path there"
            )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in many containers
        return "unknown"
