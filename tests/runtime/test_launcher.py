"""The launcher's command and port; what it does with signals is tested with real runs in tests/train."""

import socket

import pytest

from megatron_ext.errors import UserError
from megatron_ext.runtime.launcher import LaunchOptions, free_port, launch_command


def test_command_goes_through_the_deepspeed_launcher() -> None:
    command = launch_command(LaunchOptions(ranks=3, on_cpu=True), ["run.json", "--set", "a=b c"])
    assert command[1].endswith("deepspeed")
    assert command[command.index("--num_gpus") + 1] == "3"
    assert command[-5:] == ["--module", "megatron_ext.worker", "run.json", "--set", "a=b c"]


def test_port_in_use_is_refused() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--master-port {port} cannot be used"):
            launch_command(LaunchOptions(ranks=1, on_cpu=True, master_port=port), [])


def test_free_port_can_be_bound() -> None:
    with socket.create_server(("127.0.0.1", free_port())):
        pass
