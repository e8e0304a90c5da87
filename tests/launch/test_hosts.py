"""Hostfiles and choices of hosts, and values on their way to a host: compared with DeepSpeed's own launcher."""

import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from deepspeed.launcher.runner import parse_inclusion_exclusion
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.launch.forwarding import choose_variables, environment_file, remote_argument
from megatron_ext.launch.hosts import Host, choose_hosts, read_hostfile

HOSTS = [Host("n1", (0, 1)), Host("n2", (0, 1, 2)), Host("gpu-3.local", (0,))]


def test_a_hostfile_is_read_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# all of them\n\nn2 slots=2   # the fast one\nn1\tslots=1\n")
    assert read_hostfile(path) == [Host("n2", (0, 1)), Host("n1", (0,))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n1 slots=2\nn2\n", "hosts:2: 'n2' is not of the form"),
        ("n1 slots=0\n", "hosts:1: 'n1 slots=0'"),
        ("n1 slots=-1\n", "hosts:1"),
        ("n1 slots=2 n2 slots=2\n", "hosts:1"),
        ("n1;reboot slots=2\n", "hosts:1"),
        ("-oProxyCommand=x slots=1\n", "hosts:1"),
        ("n1 slots=1\nn1 slots=2\n", "hosts:2: host n1 is named a second time"),
        ("# none\n", "names no host"),
    ],
)
def test_a_bad_hostfile_is_one_message(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_hostfile(path)


def test_a_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


NAMES = st.sampled_from(["n1", "n2", "gpu-3.local"])
SLOTS = {host.name: host.slots for host in HOSTS}


@st.composite
def choices(draw: st.DrawFn) -> str:
    parts = []
    for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
        slots = draw(st.lists(st.sampled_from(SLOTS[name]), max_size=3, unique=True))
        parts.append(f"{name}:{','.join(map(str, slots))}" if slots else name)
    return "@".join(parts)


@given(choices(), st.booleans())
def test_a_choice_is_the_one_that_deepspeed_makes(text: str, include: bool) -> None:
    offered = {host.name: len(host.slots) for host in HOSTS}
    theirs = parse_inclusion_exclusion(offered, text if include else "", "" if include else text)
    try:
        ours = choose_hosts(HOSTS, include=text if include else "", exclude="" if include else text)
    except UserError:
        ours = []
    assert {host.name: list(host.slots) for host in ours} == {name: sorted(slots) for name, slots in theirs.items()}
    assert [host.name for host in ours] == list(theirs)


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        ("n9", "", "no host n9; it has n1, n2, gpu-3.local"),
        ("n1:5", "", "host n1 has no slot 5"),
        ("n1:a", "", "'n1:a' is not of the form"),
        ("n1", "n2", "exclude each other"),
        ("", "n1@n2@gpu-3.local", "leaves no host"),
    ],
)
def test_a_bad_choice_is_one_message(include: str, exclude: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose_hosts(HOSTS, include=include, exclude=exclude)


NASTY = st.text(st.sampled_from("ab $`\\\"'!*?;&|<>(){}[]#~%hnu=:,./-é"), max_size=12)


class Launcher(PDSHRunner):  # type: ignore[misc]
    """The launcher's treatment of variables and arguments alone."""

    def __init__(self, arguments: list[str]) -> None:
        self.exports: dict[str, str] = {}
        self.args = type("Arguments", (), {"user_args": arguments})


def as_pdsh(text: str) -> str:
    """What pdsh makes of a command for host H with rank 7 as user U."""
    made, rest = "", text
    while rest:
        if rest[0] == "%" and rest[1:2] in ("h", "n", "u", "%"):
            made += {"h": "H", "n": "7", "u": "U", "%": "%"}[rest[1]]
            rest = rest[2:]
        else:
            made, rest = made + rest[0], rest[1:]
    return made


def through_the_shell(lines: str, arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    launcher = Launcher([remote_argument(argument) for argument in arguments])
    for line in lines.splitlines(keepends=True):
        launcher.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {key}={value}; " for key, value in launcher.exports.items())
    program = 'for a in "$@"; do printf "%s\\\\0" "$a"; done; env -0'.replace("%", "%%")
    words = " ".join([exports, f"sh -c '{program}' x", *launcher.parse_user_args()])
    done = subprocess.run(
        ["env", "-i", "PATH=/usr/bin:/bin", "LC_ALL=C.UTF-8", "bash", "-c", as_pdsh(words)],
        capture_output=True,
        text=True,
        check=True,
    )
    items = done.stdout.split("\0")[:-1]
    got, variables = items[: len(arguments)], items[len(arguments) :]
    return dict(item.split("=", maxsplit=1) for item in variables), got


@settings(max_examples=60)
@given(NASTY, NASTY)
def test_what_travels_on_a_command_line_arrives_as_it_is(value: str, argument: str) -> None:
    forwarded = choose_variables({"MINE": value}, ["MINE"])
    variables, arguments = through_the_shell(environment_file(forwarded.on_command_line), [argument, "--set", "a=b c"])
    assert arguments == [argument, "--set", "a=b c"]
    assert {"MINE": variables.get("MINE", forwarded.in_private_file.get("MINE"))} == {"MINE": value}


def test_a_list_decides_what_travels() -> None:
    environment = {
        "PATH": "/bin",
        "HF_HOME": "/hf",
        "WANDB_MODE": "offline",
        "NCCL_DEBUG": "INFO",
        "HOME": "/root",
        "MEGATRON_EXT_JOB": "1",
        "MEGATRON_EXT_KERNEL_CACHE": "/shared/kernels",
    }
    forwarded = choose_variables(environment, ["HF_HOME", "WANDB_*", "MEGATRON_*"])
    kernels = {"MEGATRON_EXT_KERNEL_CACHE": "/shared/kernels"}
    assert forwarded.on_command_line == {"HF_HOME": "/hf", "WANDB_MODE": "offline", "NCCL_DEBUG": "INFO"} | kernels
    assert forwarded.in_private_file == {}


def test_secrets_and_what_no_line_holds_take_the_private_way() -> None:
    environment = {
        "HF_TOKEN": "t",
        "WANDB_API_KEY": "k",
        "X_PASSWORD": "p",
        "LINES": "a\nb",
        "EDGES": " a",
        "KEYS": "x",
    }
    forwarded = choose_variables(environment, ["*"])
    assert forwarded.on_command_line == {}
    assert forwarded.in_private_file == environment
    plain = {"MONKEY": "m", "KEYBOARD": "k", "TURKEY_X": "t"}
    assert choose_variables(plain, ["*"]).on_command_line == plain
