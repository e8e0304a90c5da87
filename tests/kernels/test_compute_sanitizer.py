"""The command lines of compute-sanitizer, with a program in its place that writes down what it was asked."""

from pathlib import Path

import pytest

from tests.kernels import compute_sanitizer


def _stand_in(folder: Path, status: int) -> Path:
    program = folder / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\nexit {status}\n')
    program.chmod(0o755)
    return folder / "asked"


def test_each_tool_runs_the_tests_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _stand_in(tmp_path, 0)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert compute_sanitizer.main() == 0
    lines = asked.read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["memcheck", "racecheck", "initcheck"]
    for line in lines:
        assert "--error-exitcode 99" in line
        assert line.endswith("-m gpu -k cuda tests/kernels")


def test_a_tool_that_finds_something_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _stand_in(tmp_path, 99)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert compute_sanitizer.main() == 99
    assert len(asked.read_text().splitlines()) == 1


def test_without_it_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compute_sanitizer.main() == 0
    assert "not on PATH" in capsys.readouterr().out
