"""Errors that are the user's to mend."""


class UserError(Exception):
    """A failure that the command line shows as one line, without a traceback."""
