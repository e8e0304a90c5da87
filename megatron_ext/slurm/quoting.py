"""Any text as one word of bash, and as one value of an #SBATCH line."""

import re
import shlex
from collections.abc import Iterable

from megatron_ext.errors import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_DIRECTIVE = 1000
"""Bytes; sbatch reads an argument of an #SBATCH line into a buffer of 1 KiB in some releases."""


def word(text: str) -> str:
    """``text`` as one word of bash that stands for exactly it, on one line.

    Raises:
        UserError: it holds a null character, which no argument can.
    """
    if "\0" in text:
        raise UserError(f"{text!r} holds a null character, which no file name or argument can; remove it")
    if not _CONTROL.search(text):
        return shlex.quote(text)
    return f"$'{''.join(map(_escaped, text))}'"


def _escaped(character: str) -> str:
    if _CONTROL.match(character):
        # Octal with all three digits: it ends there whatever follows.
        return f"\\{ord(character):03o}"
    return f"\\{character}" if character in "\\'" else character


def words(texts: Iterable[str]) -> str:
    """Several words."""
    return " ".join(map(word, texts))


def directive(option: str, value: str | None = None) -> str:
    """The #SBATCH line of ``--option``, or ``--option=value``, from which sbatch reads exactly the value.

    sbatch takes a backslash before the next character as that character, also in quotes, and ends an unquoted value at
    white space or "#".

    Raises:
        UserError: the value holds a line break or another control character, or is too long for sbatch.
    """
    if value is None:
        return f"#SBATCH --{option}"
    if _CONTROL.search(value):
        raise UserError(f"--{option} is {value!r}: SLURM takes no line breaks and control characters here; remove them")
    if len(value.encode(errors="surrogateescape")) > _LONGEST_DIRECTIVE:
        raise UserError(f"--{option} is {value[:60]!r}...: longer than sbatch's {_LONGEST_DIRECTIVE} bytes")
    if re.fullmatch(r"[\w./:,@%+=-]+", value, flags=re.ASCII):
        return f"#SBATCH --{option}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{escaped}"'
