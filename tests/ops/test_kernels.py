"""Kernels are chosen once, the same on every rank, with a reason where they are not the fused ones."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from megatron_ext.errors import UserError
from megatron_ext.ops import loading
from megatron_ext.ops.building.builder import Library
from megatron_ext.ops.building.toolchain import KernelsUnavailableError
from megatron_ext.ops.choice import Wanted, choose_kernels
from megatron_ext.runtime.environment import rank_info
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.process_group import Processes
from tests.engine.training import CPU
from tests.ranks import run_ranks, single_rank

NO_COMPILER = "g++ is not installed; install g++"


def processes() -> Processes:
    store = dist.HashStore()  # type: ignore[attr-defined]
    return Processes(info=rank_info(), host_group=dist.new_group(backend="gloo"), store=store)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.INFO)
    with single_rank():
        yield caplog


def broken(_backend: str) -> None:
    raise KernelsUnavailableError(NO_COMPILER)


def test_reference_loads_nothing(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_operators", broken)
    assert choose_kernels("reference", device=CPU, processes=processes()) == "reference"
    assert [record.getMessage() for record in log.records if "kernels" in record.getMessage()] == [
        "kernels: reference (PyTorch's own operations), as model.kernels says"
    ]


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("wanted", ["auto", "fused"])
def test_fused_where_they_can_be_had(log: pytest.LogCaptureFixture, wanted: Wanted) -> None:
    assert choose_kernels(wanted, device=CPU, processes=processes()) == "fused"
    (line,) = [record.getMessage() for record in log.records if "kernels" in record.getMessage()]
    assert line.startswith("kernels: fused (")


def test_auto_falls_back_and_says_why_and_fused_ends_the_run(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_operators", broken)
    assert choose_kernels("auto", device=CPU, processes=processes()) == "reference"
    (line,) = [record.getMessage() for record in log.records if "kernels" in record.getMessage()]
    assert line == f"kernels: reference (PyTorch's own operations): {NO_COMPILER} (rank 0)"
    with pytest.raises(UserError, match=r'model\.kernels is "fused" and they cannot be had: g\+\+ is not installed'):
        choose_kernels("fused", device=CPU, processes=processes())


def _choose(rank: int, _world: int) -> list[str]:
    library = Library("cpu", Path("library.so"), 1.0, False, ())
    with patch.object(loading, "load_operators", broken if rank == 1 else lambda _backend: library):
        group = processes()
        with pytest.raises(UserError) as refused:
            choose_kernels("fused", device=CPU, processes=group)
        return [choose_kernels("auto", device=CPU, processes=group), str(refused.value)]


def test_one_rank_without_them_decides_for_all() -> None:
    (kernels, refusal), second = run_ranks(_choose, 2)
    assert second == [kernels, refusal]
    assert kernels == "reference"
    assert "(rank 1)" in refusal


def test_a_library_that_does_not_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "libmegatron_ext_cpu.so"
    path.write_text("not a library", encoding="utf-8")
    library = Library("cpu", path, 1.0, False, ())
    monkeypatch.setattr(loading, "find_library", lambda _backend: library)
    with pytest.raises(KernelsUnavailableError, match=r"does not load .* kernels build --cpu --force"):
        loading.load_operators.__wrapped__("cpu")


def test_a_run_on_the_reference_imports_nothing_of_the_build() -> None:
    operations = "choice, add_layer_norm, bias_dropout_add, bias_gelu, cross_entropy, softmax, adam_variance"
    look = f"import sys; from megatron_ext.ops import {operations}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert "megatron_ext.ops.loading" not in done.stdout
    assert "megatron_ext.ops.building" not in done.stdout
