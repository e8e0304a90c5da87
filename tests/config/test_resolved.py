"""The file that ranks start from: read without the loader, which takes everything else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.config.loading import load_config
from megatron_ext.config.resolved import read_config, resolved_json
from megatron_ext.errors import UserError
from tests.config.builders import small_config, small_tree

_READ = """
import sys
from pathlib import Path
from megatron_ext.config.resolved import read_config
read_config(Path(sys.argv[1]))
print("megatron_ext.config.loading" in sys.modules)
"""


def test_a_resolved_config_is_read_as_it_was_written_and_without_the_loader(tmp_path: Path) -> None:
    config, file = small_config(), tmp_path / "config.json"
    file.write_text(resolved_json(config))
    assert read_config(file) == config
    done = subprocess.run([sys.executable, "-c", _READ, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_other_file_is_read_as_the_loader_reads_it(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps(small_tree()))
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"$comment": "more", "extends": "base.json", "seed": 7}))
    assert read_config(file) == load_config(file)
    assert read_config(file, ["seed=8"]).seed == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no valid JSON"),
        (json.dumps(small_tree() | {"sed": 7}), "did you mean"),
        (json.dumps(small_tree()).replace("{", '{"seed": 1, "seed": 2, ', 1), "seed is written twice"),
        ("[]", "a list"),
    ],
)
def test_a_mistake_is_explained(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        read_config(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_config(tmp_path / "nowhere.json")
