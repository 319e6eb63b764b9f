"""The one exception of this sub-package that the command line turns into a line of text."""


class UserError(Exception):
    """Something the user can put right. Its message is one line and says what to do; `orepa` prints it and exits with 2."""
