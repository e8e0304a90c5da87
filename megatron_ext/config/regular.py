"""Reading a file that may be anything, since a config or a person named it."""

import os
import stat
from pathlib import Path

MAX_BYTES = 4 << 20
"""Of a config file; the longest that makes sense has some kilobytes."""


def read_regular(path: Path) -> bytes:
    """The content of a config file.

    Raises:
        OSError: it cannot be read.
        ValueError: no regular file (a pipe would be waited for, a device has no end), or longer than ``MAX_BYTES``.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES >> 20} MiB, which no config is")
    return content
