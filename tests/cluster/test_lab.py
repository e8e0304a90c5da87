"""The lab is what the cluster tests believe it is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.lab import ROOT, Lab, why_not
from tests.cluster.runs import wait_until


def test_hosts_are_machines_of_their_own(lab: Lab) -> None:
    assert lab.run(["hostname"]).stdout == "login\n"
    assert lab.run(["hostname"], host="n2").stdout == "n2\n"
    assert lab.run(["ssh", "n2", "hostname -I; getent hosts n2 n1"]).stdout.split() == [
        *("10.77.0.2", "127.0.1.1", "n2", "10.77.0.1", "n1")
    ]
    hosts = lab.run(["pdsh", "-w", "n[1-3]", "hostname"], env={"PDSH_RCMD_TYPE": "ssh"}).stdout
    assert sorted(hosts.splitlines()) == ["n1: n1", "n2: n2", "n3: n3"]
    sleeper = lab.start(["sleep", "1234"], host="n2")
    try:
        wait_until(lambda: bool(lab.processes("n2", "sleep 1234")), 30.0)  # on a busy machine it begins late
        assert not lab.processes("n1", "sleep 1234")
    finally:
        sleeper.end()
    assert not lab.processes("n2", "sleep 1234")


def test_there_is_no_way_out(lab: Lab) -> None:
    routes = lab.run(["ip", "route"]).stdout.splitlines() + lab.run(["ip", "route"], host="n1").stdout.splitlines()
    assert all(route.startswith("10.77.0.0/24") for route in routes), routes


def test_a_host_is_cut_off_and_comes_back(lab: Lab) -> None:
    asked = ["ssh", "-o", "ConnectTimeout=1", "n3", "true"]
    lab.cut("n3")
    assert lab.run(asked).returncode == 255
    lab.join("n3")
    assert lab.run(["ssh", "n3", "true"]).returncode == 0
    lab.power_off("n3")
    assert lab.run(asked).returncode == 255
    lab.boot("n3")
    assert lab.run(["ssh", "n3", "hostname"]).stdout == "n3\n"


@pytest.mark.cluster
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_killed_lab_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.cluster.lab", "--hosts", "1", "--", "sleep", "4321"]
    lab = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 60
    while not running("sleep 4321"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert any(tmp_path.glob("lab-*"))
    lab.send_signal(signal.SIGKILL)
    lab.wait()
    while running(str(tmp_path)) or running("sleep 4321") or any(tmp_path.glob("lab-*")):
        assert time.monotonic() < deadline, running(str(tmp_path))
        time.sleep(0.05)


def running(word: str) -> list[str]:
    """Command lines of this machine's processes that hold ``word``, but for the one that starts the lab."""
    lines = subprocess.run(["ps", "-ww", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in lines.splitlines() if word in line and "tests.cluster.lab --hosts" not in line]
