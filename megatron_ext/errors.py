"""Exceptions that are no bug of ours: the input is wrong, or a run has to end."""

from megatron_ext.text import printable


class UserError(ValueError):
    """Bad input: a key, a file or an environment that the user has to change.

    The message names what is wrong (key or file), the value found, and what to do. The command line prints it
    without a traceback and exits with status 2.
    """

    def __str__(self) -> str:
        """The message, in which a name or a value from somewhere else cannot give orders to the terminal."""
        return printable(super().__str__())


class RunStopped(Exception):  # noqa: N818 - nothing is wrong with the program
    """Ends a run on all ranks at once with one message, without a traceback, and with status 1."""
