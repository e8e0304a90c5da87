"""Print the lowest version that pyproject.toml allows of every dependency, as pip constraints (name==version)."""

import re
import sys
import tomllib
from pathlib import Path

BOUNDED = re.compile(
    r"^(?P<name>[A-Za-z0-9_.-]+)>=(?P<low>[0-9][0-9.]*),<(?P<high>[0-9][0-9.]*)(?P<marker>; python_version [^;]+)?$"
)


def bounds(pyproject: Path, extras: tuple[str, ...]) -> dict[str, tuple[str, str, str]]:
    """Lower (inclusive) and upper (exclusive) bound and marker ("" or "; python_version ...") of each dependency.

    Those of ``extras`` too.

    Raises:
        ValueError: a requirement that is not written ``name>=low,<high``.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    found = {}
    for requirement in wanted:
        match = BOUNDED.match(requirement)
        if match is None:
            raise ValueError(f"{pyproject}: {requirement!r} is not written name>=low,<high")
        found[match["name"]] = (match["low"], match["high"], match["marker"] or "")
    return found


if __name__ == "__main__":
    lowest = bounds(Path(__file__).parents[1] / "pyproject.toml", tuple(sys.argv[1:]))
    sys.stdout.writelines(f"{name}=={low}{marker}\n" for name, (low, _, marker) in sorted(lowest.items()))
