"""The first process of the lab's login node: sets up network and daemons, starts the hosts, and does what it is told.

Started by ``tests.cluster.lab`` in new namespaces. Reads ``off HOST`` and ``boot HOST`` from stdin; its end is
the lab's end.
"""

import os
import select
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster.lab import NAMESPACES
from tests.cluster.lab_slurm import SlurmOptions, start_controller, write_configuration

_NETWORK = "10.77.0"
_LOGIN = f"{_NETWORK}.254"
_UP_SECONDS = 30.0

_SSHD = """Port 22
HostKey {folder}/ssh/hostkey
AuthorizedKeysFile {folder}/ssh/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
PrintMotd no
MaxStartups 100
UseDNS no
"""

_SSH = """Host *
 IdentityFile {folder}/ssh/key
 StrictHostKeyChecking no
 UserKnownHostsFile /dev/null
 LogLevel ERROR
"""


def main(folder: Path, hosts: int, slurm: SlurmOptions | None, *, temporary: bool) -> None:
    """Bring the lab up, say so, and serve until stdin ends; then remove ``folder`` if it is temporary."""
    names = [f"n{index}" for index in range(1, hosts + 1)]
    _prepare(folder, names)
    _tell("ip", "link", "set", "lo", "up")
    _tell("ip", "link", "add", "lab", "type", "bridge")
    _tell("ip", "addr", "add", f"{_LOGIN}/24", "dev", "lab")
    _tell("ip", "link", "set", "lab", "up")
    if slurm is not None:
        write_configuration(folder, slurm, login=_LOGIN, network=_NETWORK)
        start_controller(folder)
    running = {name: _boot(folder, name, slurm is not None) for name in names}
    _wait_until_up(folder, names, slurm is not None)
    print("up", flush=True)  # noqa: T201
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], 0.1)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
        _reap(running)
        if not readable:
            continue
        line = os.read(0, 4096).decode()
        if not line:
            # Whoever started the lab has ended, perhaps without a chance to clean up.
            for process in running.values():
                process.kill()
            if temporary:
                shutil.rmtree(folder, ignore_errors=True)
            return
        word, name = line.split()
        if word == "off" and name in running:
            running[name].kill()
            running[name].wait()
        elif word == "boot":
            running[name] = _boot(folder, name, slurm is not None)
            _wait_until_up(folder, [name], slurm is not None)
        print("done", flush=True)  # noqa: T201


def _prepare(folder: Path, names: list[str]) -> None:
    socket.sethostname("login")
    for part in ("ssh", "log", "run", "etc"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    _tell("mount", "-t", "tmpfs", "-o", "mode=755", "lab", "/run")
    Path("/run/sshd").mkdir()
    if (own := Path.home() / ".ssh").is_dir():
        _tell("mount", "-t", "tmpfs", "-o", "mode=700", "lab", str(own))
    for key in ("key", "hostkey"):
        if not (folder / "ssh" / key).exists():
            _tell("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "ssh" / key))
    (folder / "etc" / "sshd_config").write_text(_SSHD.format(folder=folder))
    (folder / "etc" / "ssh_config").write_text(_SSH.format(folder=folder))
    _tell("mount", "--bind", str(folder / "etc" / "ssh_config"), "/etc/ssh/ssh_config")
    addresses = [f"{_LOGIN} login"] + [f"{_address(name)} {name}" for name in names]
    for name in ("login", *names):
        # Debian's installer gives a machine's own name this address.
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}"]
        lines += [line for line in addresses if line.split()[1] != name]
        (folder / "etc" / f"hosts.{name}").write_text("\n".join(lines) + "\n")
    _tell("mount", "--bind", str(folder / "etc" / "hosts.login"), "/etc/hosts")


def _address(name: str) -> str:
    return f"{_NETWORK}.{name.removeprefix('n')}"


def _boot(folder: Path, name: str, slurm: bool) -> "subprocess.Popen[bytes]":
    inside = [sys.executable, "-m", "tests.cluster.lab_host", str(folder), name, _address(name), str(int(slurm))]
    with (folder / "log" / f"host.{name}.log").open("ab") as log:
        process = subprocess.Popen(
            ["unshare", *NAMESPACES, *inside], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (child := children.read_text().strip()):
        time.sleep(0.002)
    (folder / "run" / f"{name}.pid").write_text(child)
    subprocess.run(["ip", "link", "del", f"to-{name}"], stderr=subprocess.DEVNULL, check=False)
    # The same hardware address at each boot: nobody's table of neighbors is out of date.
    hardware = f"02:00:00:00:00:{int(name.removeprefix('n')):02x}"
    peer = ("peer", "name", "eth0", "address", hardware, "netns", child)
    _tell("ip", "link", "add", f"to-{name}", "type", "veth", *peer)
    _tell("ip", "link", "set", f"to-{name}", "master", "lab", "up")
    return process


def _wait_until_up(folder: Path, names: list[str], slurm: bool) -> None:
    deadline = time.monotonic() + _UP_SECONDS
    waiting = list(names)
    while waiting and time.monotonic() < deadline:
        try:
            socket.create_connection((_address(waiting[0]), 22), timeout=1.0).close()
            waiting.pop(0)
        except OSError:
            time.sleep(0.02)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    while slurm and not waiting and time.monotonic() < deadline:
        sinfo = ["sinfo", "-h", "-N", "-t", "idle", "-n", ",".join(names)]
        idle = subprocess.run(sinfo, env=environment, capture_output=True, text=True, check=False).stdout
        if len(idle.splitlines()) == len(names):
            break
        time.sleep(0.05)
    if waiting or time.monotonic() >= deadline:
        sys.exit(f"not up: {' '.join(waiting or names)}")


def _reap(running: "dict[str, subprocess.Popen[bytes]]") -> None:
    """Collect what ended and has no other parent: this process is the namespace's first."""
    known = {process.pid for process in running.values()}
    for entry in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if int(entry) not in known:
            os.waitpid(int(entry), os.WNOHANG)


def _tell(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    lab_folder, temporary_text, hosts_text, slurm_text, cpus, gpus, further = sys.argv[1:]
    wanted = SlurmOptions(int(hosts_text), int(cpus), int(gpus), further) if slurm_text == "1" else None
    main(Path(lab_folder), int(hosts_text), wanted, temporary=temporary_text == "1")
