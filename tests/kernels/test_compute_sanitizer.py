"""The command lines of compute-sanitizer, with a program in its place that writes down what it was asked."""

from pathlib import Path

import pytest

from tests.kernels import compute_sanitizer


@pytest.mark.parametrize(("status", "tools"), [(0, ["memcheck", "racecheck", "initcheck"]), (99, ["memcheck"])])
def test_each_tool_runs_the_tests_of_the_device_until_one_finds_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, tools: list[str]
) -> None:
    program, asked = tmp_path / "compute-sanitizer", tmp_path / "asked"
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert compute_sanitizer.main() == status
    lines = asked.read_text().splitlines()
    assert [line.split()[1] for line in lines] == tools
    for line in lines:
        assert "--error-exitcode 99" in line
        assert line.endswith("-m gpu -k cuda tests/kernels")


def test_without_it_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compute_sanitizer.main() == 0
    assert "not on PATH" in capsys.readouterr().out
