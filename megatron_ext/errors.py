"""Exceptions that are no bug of ours: the input is wrong, or a run has to end."""


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


def printable(text: str) -> str:
    """The text with what a terminal would obey, or could not show, as Python's escapes; lines and tabs stay."""
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
