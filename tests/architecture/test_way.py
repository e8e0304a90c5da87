"""The plainest run stays short to read."""

from pathlib import Path

from tests.architecture.way import loaded_files

MOST_FILES, MOST_LINES = 70, 9500


def test_the_plainest_run_loads_few_files(tmp_path: Path) -> None:
    files = loaded_files(tmp_path)
    listing = "\n".join(f"{lines:5d} {file}" for file, lines in files.items())
    assert len(files) <= MOST_FILES, f"{len(files)} files:\n{listing}"
    assert sum(files.values()) <= MOST_LINES, f"{sum(files.values())} lines:\n{listing}"
    assert "trainer.py" in files
    assert not [file for file in files if file.startswith(("cli/", "analysis/", "experiments/"))]
