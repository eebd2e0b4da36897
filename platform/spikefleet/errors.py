"""The two ways in which a command may end badly."""


class UserError(ValueError):
    """Something that the user can mend: one sentence that names what is wrong, where, and the remedy (exit code 2)."""


class RunError(RuntimeError):
    """A run that began and could not be brought to its end: one sentence that says why (exit code 1)."""
