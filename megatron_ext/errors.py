"""The one exception that means "the input is wrong"; everything else is a bug of ours."""


class UserError(ValueError):
    """Bad input: a key, a file or an environment that the user has to change.

    The message names what is wrong (key or file), the value found, and what to do. The command line prints it
    without a traceback and exits with status 2.
    """

    def __str__(self) -> str:
        """The message, in which a name or a value from somewhere else cannot give orders to the terminal."""
        return printable(super().__str__())


def printable(text: str) -> str:
    """The text with what a terminal would obey, or could not show, as Python's escapes; lines and tabs stay."""
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
