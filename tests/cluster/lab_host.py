"""The first process of a host of the lab: its network, sshd and, where asked for, slurmd; collects orphans as init."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path


def main(folder: Path, name: str, address: str, *, slurm: bool) -> None:
    """Bring the host up and serve until it is killed."""
    socket.sethostname(name)
    _tell("mount", "-t", "tmpfs", "lab", "/dev/shm")
    _tell("mount", "--bind", str(folder / "etc" / f"hosts.{name}"), "/etc/hosts")
    while "eth0" not in {interface for _, interface in socket.if_nameindex()}:
        time.sleep(0.002)
    _tell("ip", "link", "set", "lo", "up")
    _tell("ip", "addr", "add", f"{address}/24", "dev", "eth0")
    _tell("ip", "link", "set", "eth0", "up")
    # What a login on a real machine starts with, and nothing of the caller's own.
    bare = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": os.environ["HOME"]}
    log = folder / "log" / f"sshd.{name}.log"
    subprocess.Popen(["/usr/sbin/sshd", "-D", "-E", str(log), "-f", str(folder / "etc" / "sshd_config")], env=bare)
    if slurm:
        (folder / "run" / f"spool.{name}").mkdir(exist_ok=True)
        subprocess.Popen(["slurmd", "-D"], env=bare | {"SLURM_CONF": str(folder / "slurm.conf")})
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.1)


def _tell(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], slurm=sys.argv[4] == "1")
