"""The entry point: exit codes, help, and that what needs no torch imports none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext import __version__
from megatron_ext.cli import app
from megatron_ext.errors import UserError
from tests.cli.conftest import CommandLine

CONFIGS = Path(__file__).parents[2] / "configs"
SLW_1_5B = str(CONFIGS / "gpt2" / "1.5b_slw.json")

# Runs the command line in a fresh process and tells, after it, what was imported and the CPU seconds it took.
_PROBE = """
import json, sys, time
from megatron_ext.cli.app import main
try:
    main()
except SystemExit as exit:
    code = exit.code
heavy = sorted({"torch", "deepspeed", "megatron", "transformers", "matplotlib"} & set(sys.modules))
print(json.dumps({"code": code, "heavy": heavy, "seconds": time.process_time()}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["validate", SLW_1_5B], ["schema"], ["plan", SLW_1_5B]], ids=lambda a: a[0]
)
def test_what_needs_no_torch_is_fast_and_imports_none(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    answer = json.loads(done.stderr.splitlines()[-1])
    assert answer["heavy"] == []
    assert answer["seconds"] < 1.0
    assert answer["code"] == 0


def test_help_lists_every_command_and_shows_an_example(command_line: CommandLine) -> None:
    text = command_line("--help").out
    assert "Example: megatron-ext" in text
    for name in app.COMMANDS:
        assert f"\n  {name} " in text


@pytest.mark.parametrize("command", ["validate", "plan", "generate", "tokenizer train"])
def test_an_example_is_on_one_line_of_a_narrow_terminal(command: str, command_line: CommandLine) -> None:
    lines = command_line(*command.split(), "--help").out.splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith("  Example: "))
    assert lines[place].startswith(f"  Example: megatron-ext {command} ")
    assert lines[place + 1] == ""


@pytest.mark.parametrize("name", app.COMMANDS)
def test_a_commands_help_shows_an_example(name: str, command_line: CommandLine) -> None:
    text = " ".join(command_line(name, "--help").out.split())
    assert f"megatron-ext {name}" in text.replace(f"Usage: megatron-ext {name}", "", 1)


def test_python_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ext", "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0
    assert done.stdout == f"megatron-ext {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate"], "Missing argument"),
        (["validate", SLW_1_5B, "--sat", "a=b"], "No such option"),
        (["validat", SLW_1_5B], "No such command 'validat'"),
        (["validate", "nowhere.json"], "error: config file nowhere.json does not exist"),
        (["validate", SLW_1_5B, "--set", "seed"], 'error: --set "seed" is not of the form'),
        (["validate", SLW_1_5B, "--set", "seed=-1"], "error: --set: seed is -1: expected at least 0"),
    ],
)
def test_bad_input_exits_with_2_and_one_message(arguments: list[str], message: str, command_line: CommandLine) -> None:
    assert message in command_line(*arguments, code=2).err


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the command ``schema`` raise ``error``."""

    def command() -> None:
        raise error

    monkeypatch.setattr("megatron_ext.cli.schema.command", command)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(UserError("seed is -1: write 1"), 2, "error: seed is -1: write 1\n"), (KeyboardInterrupt(), 130, "")],
)
def test_what_a_command_raises_becomes_an_exit_code(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine
) -> None:
    raising(error, monkeypatch)
    assert command_line("schema", code=code).err.lstrip() == message


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(AssertionError("ours"), monkeypatch)
    monkeypatch.setattr(sys, "argv", ["megatron-ext", "schema"])
    with pytest.raises(AssertionError, match="ours"):
        app.main()


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m megatron_ext schema | head -n 1"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
