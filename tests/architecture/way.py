"""The way from a run's JSON file to the optimizer: which files of the package one rank loads, and how long they are.

``python -m tests.architecture.way`` trains a small run (one rank, linear pacing, reference kernels) from its resolved
config, as every launcher starts it, and prints the files that were loaded. What a rank loads is what a reader who
follows it may have to open.
"""

import json
import tempfile
from pathlib import Path

from tests.golden.golden import CONFIG, one_rank, write_corpus

PACKAGE = Path(__file__).parents[2] / "megatron_ext"
SHORTEST = 5
"""Lines of the shortest file that counts; an ``__init__.py`` with a docstring does not."""

_PROGRAM = """
import json, sys
from megatron_ext.worker import main
status = main(sys.argv[1:])
if status:
    sys.exit(status)
modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "megatron_ext"]
files = [module.__file__ for module in modules if getattr(module, "__file__", None)]
print(json.dumps(files))
"""


def resolved(folder: Path) -> Path:
    """Write the resolved config of a run of a few steps, and its data, into ``folder``."""
    from megatron_ext.config.run import RunConfig

    write_corpus(folder / "corpus")
    values = {**CONFIG, "training": CONFIG["training"] | {"stop_after": {"steps": 3}}}
    config = RunConfig.model_validate_json(json.dumps(values))
    path = folder / "resolved.json"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return path


def loaded_files(folder: Path) -> dict[str, int]:
    """Files of the package that a rank has loaded when its run ends, and their lines."""
    files = json.loads(one_rank(folder, "-c", _PROGRAM, resolved(folder).name).splitlines()[-1])
    counted = {str(Path(file).relative_to(PACKAGE)): len(Path(file).read_text().splitlines()) for file in files}
    # The program of a rank is started as a module of its own name.
    return {file: lines for file, lines in sorted(counted.items()) if lines >= SHORTEST}


def main() -> None:
    """Print the files and their lines, the longest last."""
    with tempfile.TemporaryDirectory() as folder:
        files = loaded_files(Path(folder))
    for file, lines in sorted(files.items(), key=lambda item: item[1]):
        print(f"{lines:5d} {file}")  # noqa: T201
    print(f"{len(files)} files, {sum(files.values())} lines")  # noqa: T201


if __name__ == "__main__":
    main()
