"""A private cluster on one machine: a login node and hosts with sshd, and SLURM on top where it is asked for.

Every host is a set of Linux namespaces of its own: network (``eth0`` with 10.77.0.i), hostname, processes, /dev/shm;
files are shared, as on a cluster with a shared file system. There is no way out of the network. As Debian does it, a
host's own name resolves to 127.0.1.1 on the host itself. All of it ends with the process that started it, also when
that is killed, and nothing outside of the namespaces is touched but the state directory.

Also a command:  python -m tests.cluster.lab --hosts 3 --slurm -- srun -N 2 hostname
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
NAMESPACES = ("--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child=KILL", "--mount-proc")
_START_SECONDS = 60.0
_TOOLS = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "/usr/sbin/sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "ps": "procps",
}
_SLURM_TOOLS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge"}


@dataclass(frozen=True)
class LabOptions:
    """What a lab is made of."""

    hosts: int = 2
    slurm: bool = False
    cpus: int = 2  # CPUs that SLURM gives out on each host, whatever the machine has
    gpus: int = 0  # devices of each host that SLURM takes for GPUs; they compute nothing
    slurm_lines: str = ""  # further lines of slurm.conf, which replace the lab's own of the same key


def why_not(*, slurm: bool = False) -> str | None:
    """Why a lab cannot run on this machine; None where it can."""
    if os.geteuid() != 0:
        return "the lab's namespaces need root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    tools = _TOOLS | (_SLURM_TOOLS if slurm else {})
    missing = sorted({package for tool, package in tools.items() if shutil.which(tool, path=path) is None})
    if missing:
        return f"the lab needs the packages {' '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True, text=True, check=False
    )
    return None if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.strip()}"


class LabProcess:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def signal(self, number: int) -> None:
        """Send a signal to the command (``process`` is the nsenter before it, which passes nothing on)."""
        pid = _only_child(self.process.pid)
        while Path(f"/proc/{pid}/comm").read_text() == "nsenter\n":
            pid = _only_child(pid)
        os.kill(pid, number)

    def wait(self, timeout: float) -> int:
        """Exit status of the command; subprocess.TimeoutExpired when it goes on for longer."""
        return self.process.wait(timeout)

    def end(self) -> None:
        """Kill the command if it still runs; its output can be read from its files only."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait()


class Lab:
    """The running lab; a context manager."""

    def __init__(self, options: LabOptions, folder: Path | None = None) -> None:
        """Prepare a lab that keeps its state in ``folder``; by default a temporary one that is removed at the end."""
        self.options = options
        self.hosts = [f"n{index}" for index in range(1, options.hosts + 1)]
        self._own_folder = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="lab-")) if folder is None else folder.absolute()
        self._init: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Lab":
        self.folder.chmod(0o755)
        options = self.options
        inside = [sys.executable, "-m", "tests.cluster.lab_login", str(self.folder), str(int(self._own_folder))]
        inside += [
            str(options.hosts),
            str(int(options.slurm)),
            str(options.cpus),
            str(options.gpus),
            options.slurm_lines,
        ]
        # The login node reads commands from a pipe that this process alone holds open, and ends with it.
        self._init = subprocess.Popen(
            ["unshare", *NAMESPACES, *inside],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
        )
        try:
            self._expect("up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._init is not None
        self._init.kill()
        self._init.communicate()
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self,
        command: Sequence[str],
        *,
        host: str | None = None,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on the login node, or on ``host`` (not through its network), and return what it printed.

        Args:
            command: the program and its arguments.
            host: name of a host; None: the login node.
            timeout: seconds after which the command is killed and subprocess.TimeoutExpired is raised.
            env: variables on top of this process's own.
            cwd: working directory.
        """
        process = self.start(command, host=host, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.end()
            raise
        return subprocess.CompletedProcess(command, process.process.returncode, out, err)

    def start(
        self,
        command: Sequence[str],
        *,
        host: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> LabProcess:
        """Start a command on the login node or on ``host``; arguments as for ``run`` and subprocess.Popen."""
        assert self._init is not None
        inner = ["env", f"--chdir={cwd}", *command]
        if host is not None:
            # The host's first process, as the login node counts.
            inner = ["nsenter", "--all", "--target", (self.folder / "run" / f"{host}.pid").read_text(), *inner]
        environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"} | dict(env or {})
        if self.options.slurm:
            environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        return LabProcess(
            subprocess.Popen(
                ["nsenter", "--all", "--target", str(_only_child(self._init.pid)), *inner],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                text=True,
                env=environment,
            )
        )

    def cut(self, host: str) -> None:
        self._ip("link", "set", f"to-{host}", "down")

    def join(self, host: str) -> None:
        self._ip("link", "set", f"to-{host}", "up")

    def power_off(self, host: str) -> None:
        """End the host at once: nobody hears from it again, no connection is closed."""
        self.cut(host)
        self._ask(f"off {host}")

    def boot(self, host: str) -> None:
        self._ask(f"boot {host}")

    def processes(self, host: str | None, word: str = "python") -> list[str]:
        """State, id and command line of the processes of a host (None: the login node) whose line holds ``word``."""
        listed = self.run(["ps", "-ww", "-eo", "pidns=,stat=,pid=,args="], host=host).stdout.splitlines()
        # The login node sees the processes of all hosts as well.
        here = next(line.split()[0] for line in listed if " ps -ww" in line)
        lines = [line.partition(here)[2].strip() for line in listed if line.split()[0] == here]
        own = ("tests.cluster.lab", " ps -ww", "/usr/sbin/sshd -D", "env --chdir", "unshare --")
        return [line for line in lines if word in line and not any(part in line for part in own)]

    def _ip(self, *arguments: str) -> None:
        done = self.run(["ip", *arguments])
        assert done.returncode == 0, done.stderr

    def _ask(self, line: str) -> None:
        assert self._init is not None
        assert self._init.stdin is not None
        self._init.stdin.write(f"{line}\n")
        self._init.stdin.flush()
        self._expect("done")

    def _expect(self, word: str) -> None:
        assert self._init is not None
        assert self._init.stdout is not None
        answer = self._init.stdout.readline().strip()
        if answer != word:
            logs = "".join(f"\n--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("log/*")))
            raise RuntimeError(f"the lab answered {answer!r} instead of {word!r}{logs}")


def _only_child(pid: int) -> int:
    """The child that unshare or nsenter forked, as this process counts."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return int(children[0])
        time.sleep(0.005)
    raise RuntimeError(f"process {pid} has no child")


def main() -> int:
    """Run one command on the login node of a new lab."""
    parser = argparse.ArgumentParser(description="Run a command on the login node of a private cluster.")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--gpus", type=int, default=0, help="devices a host that SLURM takes for GPUs")
    parser.add_argument("--folder", type=Path, help="where configuration and logs are kept; by default nowhere")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    if reason := why_not(slurm=options.slurm):
        print(f"error: {reason}", file=sys.stderr)  # noqa: T201
        return 2
    with Lab(LabOptions(options.hosts, options.slurm, gpus=options.gpus), options.folder) as lab:
        return lab.start(options.command, cwd=Path.cwd()).wait(timeout=365 * 86400.0)


if __name__ == "__main__":
    sys.exit(main())
