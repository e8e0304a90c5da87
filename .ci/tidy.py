"""Look for blanks at ends of lines, files that do not end with one newline, and large files.

python .ci/tidy.py [--fix] [FILE ...]    (without files: all that git has; --fix mends what can be mended)
"""

import re
import subprocess
import sys
from pathlib import Path

LARGEST = 250_000
"""Bytes of a file that may be added: the repository is cloned by everybody, for ever."""
AS_WRITTEN = ("tests/golden/run-",)
"""What a program wrote for a test to read stays as it was written."""


def tidy(content: bytes) -> bytes:
    """Text without blanks at ends of lines and with one newline at its end."""
    text = re.sub(rb"[ \t\r]+(?=\n|\Z)", b"", content).rstrip(b"\n")
    return text + b"\n" if text else b""


def problems(path: Path, *, fix: bool) -> list[str]:
    """What is wrong with a file; with ``fix`` its text is mended."""
    content = path.read_bytes()
    found = [f"{path}: {len(content):,} bytes, more than {LARGEST:,}"] if len(content) > LARGEST else []
    if b"\0" in content or path.as_posix().startswith(AS_WRITTEN):
        return found
    if (mended := tidy(content)) != content:
        found.append(f"{path}: blanks at the end of a line, or not one newline at the end of the file")
        if fix:
            path.write_bytes(mended)
    return found


def main() -> int:
    """Exit status: 1 where something was wrong, mended or not."""
    names = [name for name in sys.argv[1:] if name != "--fix"]
    if not names:
        listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
        names = listed.rstrip("\0").split("\0")
    files = [path for path in map(Path, names) if path.is_file() and not path.is_symlink()]
    found = [line for path in files for line in problems(path, fix="--fix" in sys.argv)]
    sys.stdout.writelines(f"{line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
