"""The command line as a user types it, run in this process."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from megatron_ext.cli import app


@dataclass(frozen=True)
class Done:
    """What a command printed."""

    out: str
    err: str


class CommandLine(Protocol):
    """Runs ``megatron-ext`` with the given arguments and checks its exit status."""

    def __call__(self, *arguments: str | Path, code: int = 0) -> Done: ...


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line on a terminal of 80 columns; exit status 2 is one message and no other output."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str | Path, code: int = 0) -> Done:
        monkeypatch.setattr(sys, "argv", ["megatron-ext", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            app.main()
        done = Done(*capsys.readouterr())
        assert (exited.value.code or 0) == code, done.err
        assert "Traceback" not in done.err
        assert code != 2 or done.out == ""
        return done

    return run
