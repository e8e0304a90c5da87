"""The plainest run stays short to read."""

import re
from pathlib import Path

from tests.architecture.way import loaded_files

MOST_FILES, MOST_LINES, MOST_NAMED = 70, 9500, 35


def test_the_plainest_run_loads_few_files(tmp_path: Path) -> None:
    files = loaded_files(tmp_path)
    listing = "\n".join(f"{lines:5d} {file}" for file, lines in files.items())
    assert len(files) <= MOST_FILES, f"{len(files)} files:\n{listing}"
    assert sum(files.values()) <= MOST_LINES, f"{sum(files.values())} lines:\n{listing}"
    assert "trainer.py" in files
    assert not [file for file in files if file.startswith(("cli/", "analysis/", "experiments/"))]


def test_the_way_in_the_documents_names_few_files() -> None:
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    way = text[text.index("## The way of a training step") : text.index("## Conventions")]
    assert len(set(re.findall(r"`([\w/]+\.py)`", way))) <= MOST_NAMED
