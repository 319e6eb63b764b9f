"""The exceptions of this sub-package that the command line turns into a line of text."""


class UserError(Exception):
    """Something the user can put right. Its message is one line and says what to do; `orepa` prints it and exits with 2."""


class SharedError(UserError):
    """One that all processes of a run raise at the same place, having agreed on it. The first one tells the user."""
