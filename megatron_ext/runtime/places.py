"""Directories that a user chose and in which nothing can be written: found beforehand, or explained when it happens."""

import errno
import os
from pathlib import Path

from megatron_ext.errors import UserError

_LONGEST_NAME = 255
_KERNELS_OWN = ("proc", "sys")
_PLACES = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
        *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    }
)
"""Errors of the system that are about a place and not about the program."""


def problem_of(directory: Path) -> str | None:
    """Why ``directory`` cannot be made or written, as far as can be seen without writing; None: nothing is seen."""
    if "\0" in str(directory):
        return "its name holds a NUL character"
    path = Path(os.path.abspath(directory))  # noqa: PTH100 - resolve() fails where a name is too long
    for name in path.parts:
        if len(os.fsencode(name)) > _LONGEST_NAME:
            return f"a name of {len(os.fsencode(name))} bytes is too long, at most {_LONGEST_NAME} are possible"
    try:
        existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
        if existing.is_symlink() and not existing.exists():
            return f"{existing} is a symbolic link to nothing"
        if not existing.is_dir():
            return f"{existing} is no directory"
        if os.statvfs(existing).f_flag & os.ST_RDONLY:
            return f"{existing} is on a read-only file system"
        if existing.resolve().parts[1:2] in [(name,) for name in _KERNELS_OWN]:
            return f"{existing} is the kernel's own"
        return None if os.access(existing, os.W_OK | os.X_OK) else f"this user may not write in {existing}"
    except OSError as error:
        return error.strerror


def check_place(run_dir: Path) -> None:
    """Raise UserError where it can be seen that nothing could be written into ``run_dir``."""
    problem = problem_of(run_dir)
    if problem is not None:
        raise _told(run_dir, problem)


def unwritable(run_dir: Path, error: OSError | ValueError) -> UserError:
    """What to tell the user where writing into ``run_dir`` has failed with ``error``."""
    said = error.strerror if isinstance(error, OSError) else None
    return _told(run_dir, said or str(error), seen=problem_of(run_dir))


def explain(error: OSError) -> str | None:
    """One message for an error of the system that is about a place; None for any other, which is a bug."""
    if error.errno not in _PLACES:
        return None
    place = f"{error.filename}: " if error.filename else ""
    return (
        f"{place}{error.strerror}; make room on that disk, or choose a place in which this user may write "
        "(output_dir, name, --output)"
    )


def _told(run_dir: Path, reason: str, *, seen: str | None = None) -> UserError:
    why = reason if seen is None or seen == reason else f"{reason}: {seen}"
    return UserError(
        f"{str(run_dir)!r} cannot be written ({why}); set output_dir and name to a directory on a disk with room in "
        "which this user may write"
    )
