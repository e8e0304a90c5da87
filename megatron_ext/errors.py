"""The one exception that means "the input is wrong"; everything else is a bug of ours."""

from megatron_ext.text import printable


class UserError(ValueError):
    """Bad input: a key, a file or an environment that the user has to change.

    The message names what is wrong (key or file), the value found, and what to do. The command line prints it
    without a traceback and exits with status 2.
    """

    def __str__(self) -> str:
        """The message, in which a name or a value from somewhere else cannot give orders to the terminal."""
        return printable(super().__str__())
