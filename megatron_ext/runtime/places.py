"""Directories that a user chose and in which nothing can be written: found beforehand, or explained when it happens."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.errors import UserError

OUTPUT_DIR = "set output_dir and name"
"""What to do about the directory of a run."""

_LONGEST_NAME = 255
_KERNELS_OWN = (("proc",), ("sys",))
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
    longest = max(len(os.fsencode(name)) for name in path.parts)
    if longest > _LONGEST_NAME:
        return f"a name of {longest} bytes is too long, at most {_LONGEST_NAME} are possible"
    try:
        existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
        return next((problem for wrong, problem in _signs(existing) if wrong), None)
    except OSError as error:
        return error.strerror


def _signs(existing: Path) -> Iterator[tuple[bool, str]]:
    """What may be wrong with the innermost part of a path that is there: whether it is, and what."""
    yield existing.is_symlink() and not existing.exists(), f"{existing} is a symbolic link to nothing"
    yield not existing.is_dir(), f"{existing} is no directory"
    yield bool(os.statvfs(existing).f_flag & os.ST_RDONLY), f"{existing} is on a read-only file system"
    yield existing.resolve().parts[1:2] in _KERNELS_OWN, f"{existing} is the kernel's own"
    yield not os.access(existing, os.W_OK | os.X_OK), f"this user may not write in {existing}"


def check_place(directory: Path, *, remedy: str = OUTPUT_DIR) -> None:
    """Raise UserError where it can be seen that nothing could be written into ``directory``."""
    problem = problem_of(directory)
    if problem is not None:
        raise UserError(unusable(directory, problem, remedy=remedy))


def unwritable(run_dir: Path, error: OSError | ValueError) -> UserError:
    """What to tell the user where writing into ``run_dir`` has failed with ``error``."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    seen = problem_of(run_dir)
    return UserError(unusable(run_dir, reason if seen is None else f"{reason}: {seen}"))


def explain(error: OSError) -> str | None:
    """One message for an error of the system that is about a place; None for any other, which is a bug."""
    if error.errno not in _PLACES:
        return None
    place = f"{error.filename}: " if error.filename else ""
    return (
        f"{place}{error.strerror}; make room on that disk, or choose a place in which this user may write "
        "(output_dir, name, --output)"
    )


def unusable(directory: Path, reason: str, *, remedy: str = OUTPUT_DIR) -> str:
    """The message about a directory that cannot be made or written."""
    return (
        f"{str(directory)!r} cannot be written ({reason}); {remedy} to a directory on a disk with room in which this "
        "user may write"
    )
