"""The same small run on a GPU: as on the CPU in fp32, close to it in half precision, and resumable."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.small_run import train_records, write_config, write_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]

TRAINING: dict[str, Any] = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 40}}
MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300}


def losses_of(folder: Path, name: str, *, on_gpu: bool, **sections: Any) -> list[float]:
    """Train on one rank and return the losses."""
    config = write_config(folder, name=name, **({"model": MODEL} | sections))
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    inherited = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "megatron_ext.worker", str(config)]
    done = subprocess.run(command, env=inherited | hidden, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [record["loss"] for record in train_records(folder / name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpu")
    write_corpus(made)
    return made


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> list[float]:
    return losses_of(folder, "cpu", on_gpu=False)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_fp32_equals_the_cpu(folder: Path, on_cpu: list[float], zero_stage: int) -> None:
    parallel = {"micro_batch_tokens": 64, "zero_stage": zero_stage}
    losses = losses_of(folder, f"fp32-{zero_stage}", on_gpu=True, parallel=parallel)
    assert losses == pytest.approx(on_cpu, abs=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_half_precision_follows(folder: Path, on_cpu: list[float], precision: str, zero_stage: int) -> None:
    losses = losses_of(
        folder,
        f"{precision}-{zero_stage}",
        on_gpu=True,
        training=TRAINING | {"precision": precision},
        parallel={"micro_batch_tokens": 64, "zero_stage": zero_stage},
    )
    assert losses == pytest.approx(on_cpu, rel=0.1)


def test_fp16_resumes_with_its_loss_scale(folder: Path) -> None:
    fp16 = TRAINING | {"precision": "fp16"}
    whole = losses_of(folder, "whole", on_gpu=True, training=fp16)
    first = losses_of(folder, "parts", on_gpu=True, training=fp16 | {"stop_after": {"steps": 17}})
    assert len(first) == 17
    assert losses_of(folder, "parts", on_gpu=True, training=fp16) == pytest.approx(whole, rel=1e-3)
