"""RunConfig's own properties."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.base import Duration
from tests.config.builders import small_config


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


def test_a_resolved_config_is_parsed_without_what_only_peoples_files_need() -> None:
    for_people = {f"megatron_ext.config.{name}" for name in ("loading", "messages", "foreign", "schema")}
    code = (
        "import sys\n"
        "from megatron_ext.config.run import RunConfig\n"
        "RunConfig.model_validate_json(sys.stdin.read())\n"
        f"print(sorted({for_people} & set(sys.modules)))"
    )
    resolved = small_config(deepspeed={"fp16": {"hysteresis": 4}}, training={"precision": "fp16"}).model_dump_json()
    done = subprocess.run([sys.executable, "-c", code], input=resolved, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_duration_reads_as_words() -> None:
    assert str(Duration(steps=1500)) == "1,500 steps"
    assert str(Duration(tokens=2_000_000)) == "2,000,000 tokens"
