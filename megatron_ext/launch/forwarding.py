"""Which environment variables travel to other hosts, and how their values survive the way.

DeepSpeed's launcher puts ``KEY=VALUE`` lines of its environment file into a command line for the remote shell: it
strips the value, puts it between double quotes where it holds anything unusual, and escapes nothing. pdsh then
replaces ``%h``, ``%n`` and ``%u``. Everybody on the hosts can read a command line, so that secrets take another way: a
file that only this user can read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from megatron_ext.config.cluster import ALWAYS_FORWARDED

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|(^|_)(API_?)?KEY(_|$|S$)", re.IGNORECASE)
_QUOTED_BY_DEEPSPEED = re.compile(r"[^\w@%+=:,./-]")
# What this program says to its own processes is never taken from the caller's environment; where kernels are kept is
# the user's word.
_OWN = re.compile(r"MEGATRON_EXT_(?!KERNEL_)")


@dataclass(frozen=True)
class Forwarded:
    """Variables by the way they take."""

    on_command_line: dict[str, str] = field(default_factory=dict)
    in_private_file: dict[str, str] = field(default_factory=dict)


def choose_variables(environment: Mapping[str, str], allowed: Iterable[str]) -> Forwarded:
    """Pick the variables of the caller's ``environment`` that travel: those that always do, and those ``allowed``.

    ``allowed`` holds names and globs. What looks like a secret, and values that no line can hold, go in the private
    file.
    """
    patterns = (*ALWAYS_FORWARDED, *allowed)
    chosen = {
        name: value
        for name, value in environment.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns) and not _OWN.match(name)
    }
    private = {name for name, value in chosen.items() if looks_secret(name) or not _fits_a_line(value)}
    return Forwarded(
        on_command_line={name: value for name, value in chosen.items() if name not in private},
        in_private_file={name: value for name, value in chosen.items() if name in private},
    )


def looks_secret(name: str) -> bool:
    """Whether a variable's name says that its value is not for everybody."""
    return _SECRET.search(name) is not None


def environment_file(variables: Mapping[str, str]) -> str:
    """Text of DeepSpeed's environment file with which every value arrives as it is."""
    return "".join(f"{name}={_escaped(value)}\n" for name, value in variables.items())


def remote_argument(argument: str) -> str:
    """What to give DeepSpeed's launcher so that a program on another host gets ``argument`` as it is.

    Only an argument with a blank is put between double quotes, in which it escapes these quotes and nothing else.
    """
    percent = argument.replace("%", "%%")
    if " " in argument:
        return re.sub(r"([\\$`])", r"\\\1", percent)
    return "'" + percent.replace("'", "'\"'\"'") + "'"


def _fits_a_line(value: str) -> bool:
    return value == value.strip() and value.isprintable()


def _escaped(value: str) -> str:
    percent = value.replace("%", "%%")
    if not value:
        return ""
    return re.sub(r'([\\$`"])', r"\\\1", percent) if _QUOTED_BY_DEEPSPEED.search(value) else percent
