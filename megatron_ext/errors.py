"""The one exception that means "the input is wrong"; everything else is a bug of ours."""


class UserError(ValueError):
    """Bad input: a key, a file or an environment that the user has to change.

    The message names what is wrong (key or file), the value found, and what to do. The command line prints it
    without a traceback and exits with status 2.
    """
