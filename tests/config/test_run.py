"""RunConfig's own properties, its cluster section, and the file from which ranks start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_ext.base import Duration
from megatron_ext.config.cluster import ClusterConfig
from megatron_ext.config.loading import load_config
from megatron_ext.config.resolved import read_config, resolved_json
from megatron_ext.errors import UserError
from tests.config.builders import small_config, small_tree


def test_defaults_that_depend_on_other_sections() -> None:
    config = small_config(name="mine", output_dir="out")
    assert config.run_dir == Path("out/mine")
    assert config.micro_batch_tokens == 128
    assert config.max_positions == 128
    assert config.model.ffn_size == 256
    assert config.model.padded_vocab_size == 50304
    given = small_config(parallel={"micro_batch_tokens": 512}, model={"max_position_embeddings": 256})
    assert given.micro_batch_tokens == 512
    assert given.max_positions == 256


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"model": {"num_layers": 3}},
        {"training": {"batch_size": 16}},
        {"training": {"duration": {"steps": 101}}},
        {"data": {"tail": "recycle"}},
        {"curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": 9}}},
        {"optimizer": {"eps": 1e-7}},
        {"deepspeed": {"communication_data_type": "fp32"}},
    ],
)
def test_what_changes_the_run_changes_its_digest(changes: dict[str, Any]) -> None:
    assert small_config(**changes).digest() != small_config().digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"parallel": {"tensor": 2, "zero_stage": 2, "micro_batch_tokens": 1024}},
        {"validation": {"every": {"steps": 5}}},
        {"checkpoint": {"keep_last": 1}},
        {"metrics": {"log_every": 1}},
        {"data": {"prefetch": 0, "index_cache": "/tmp/cache"}},
        {"training": {"stop_after": {"steps": 5}}},
    ],
)
def test_layout_and_bookkeeping_do_not(changes: dict[str, Any]) -> None:
    assert small_config(**changes).digest() == small_config().digest()


def test_a_duration_reads_as_words() -> None:
    assert str(Duration(steps=1500)) == "1,500 steps"
    assert str(Duration(tokens=2_000_000)) == "2,000,000 tokens"


def test_names_and_globs_of_variables_are_taken() -> None:
    parsed = ClusterConfig.model_validate_json('{"environment": ["HF_HOME", "WANDB_*", "*"], "interface": "ib0"}')
    assert parsed.environment == ("HF_HOME", "WANDB_*", "*")


@pytest.mark.parametrize(
    "section",
    [
        {"environment": ("A=B",)},
        {"environment": ("A B",)},
        {"environment": ("",)},
        {"interface": "eth0; reboot"},
        {"interface": ""},
        {"heartbeat_seconds": -1.0},
        {"preflight": {"when": "sometimes"}},
        {"preflight": {"min_matmul_share": 1.5}},
    ],
)
def test_what_is_no_name_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ClusterConfig.model_validate(section)


def test_a_run_may_go_on_with_another_cluster_section() -> None:
    changed = small_config(cluster={"heartbeat_seconds": 5.0, "environment": ["A"]})
    assert changed.digest() == small_config().digest()


_READ = """
import sys
from pathlib import Path
from megatron_ext.config.resolved import read_config
read_config(Path(sys.argv[1]))
print(*({"megatron_ext.config." + name for name in ("loading", "messages", "foreign", "schema")} & set(sys.modules)))
"""


def test_a_resolved_config_is_read_as_it_was_written_and_without_what_only_peoples_files_need(tmp_path: Path) -> None:
    deepspeed = {"fp16": {"hysteresis": 4}}
    config, file = small_config(deepspeed=deepspeed, training={"precision": "fp16"}), tmp_path / "config.json"
    file.write_text(resolved_json(config))
    assert read_config(file) == config
    done = subprocess.run([sys.executable, "-c", _READ, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


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
