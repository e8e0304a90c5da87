"""Values survive what DeepSpeed's launcher, pdsh and a shell do to them; compared with the launcher's own code."""

import subprocess

from deepspeed.launcher.multinode_runner import PDSHRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.launch.forwarding import choose_variables, environment_file, remote_argument

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
    """Variables and arguments that a program on a host gets."""
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
