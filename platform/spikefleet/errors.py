"""The two errors that end a command: of the input, and of the run."""


class UserError(ValueError):
    """An error that the user can fix; the message names the field or file, the value and what to do (exit code 2)."""


class RunError(RuntimeError):
    """A run that started and failed; the message says why (exit code 1)."""
