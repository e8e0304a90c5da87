"""The list of faults fits the sources; that the tests notice them is `make test-mutation`'s to show."""

from pathlib import Path

import pytest

from tests.kernels.building import SOURCES
from tests.kernels.mutation import run
from tests.kernels.mutation.faults import FAULTS, Fault
from tests.kernels.mutation.run import main


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.name}")
def test_a_fault_is_in_the_sources_once(fault: Fault) -> None:
    assert fault.occurrences(SOURCES) == 1
    assert fault.old != fault.new
    for op in fault.ops:
        assert (Path(__file__).parents[1] / f"test_{op}.py").is_file()


def test_there_are_enough_faults_in_every_op() -> None:
    assert len(FAULTS) >= 25
    ops = {"layer_norm", "add_layer_norm", "softmax", "bias_gelu", "bias_dropout_add", "cross_entropy", "adam_variance"}
    assert {op for fault in FAULTS for op in fault.ops} == ops


def test_a_planted_fault_is_in_the_copy_alone(tmp_path: Path) -> None:
    fault = FAULTS[0]
    fault.plant(SOURCES, tmp_path / "csrc")
    assert fault.occurrences(tmp_path / "csrc") == 0
    assert fault.occurrences(SOURCES) == 1


def test_a_text_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "FAULTS", (Fault("gone", "common/abi.h", ("softmax",), "no such text", ""),))
    assert main() == 1
    assert "gone: its text is in common/abi.h 0 times" in capsys.readouterr().out
