"""The exceptions that the command line turns into a line of text."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can correct. The message is one line and says how; `orepa` prints it and exits with 2."""


class CollectiveError(UserError):
    """An error that all processes of a run raise at the same place. The first process reports it."""


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, without the path that an OSError repeats."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0]
