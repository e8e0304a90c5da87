"""Starts the ranks of a run through the deepspeed launcher: on this machine, or on several hosts over pdsh and ssh.

Whatever can be wrong with a host is asked before anything starts there. The ranks start from one file, the resolved
config. Nothing that a user wrote goes through a remote shell but in a form in which the shell finds nothing to do: the
file is on the shared file system, the launcher works from ``/``, and the environment is a list of names
(``launch/forwarding.py``). A supervisor (``launch/supervisor.py``) sees the run through, because deepspeed's launcher
dies on SIGTERM and leaves its ranks behind.
"""

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from megatron_ext.config.cluster import ClusterConfig
from megatron_ext.config.resolved import resolved_json
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.sampler import check_batches_divide, data_parallel_size
from megatron_ext.data.sources import check_data
from megatron_ext.errors import UserError
from megatron_ext.launch.forwarding import choose_variables, environment_file, remote_argument
from megatron_ext.launch.hosts import (
    JOB,
    NO_WAY,
    PACKAGE_ROOT,
    SSH_OPTIONS,
    WORKER,
    Answer,
    Host,
    HostReport,
    ask_hosts,
    report,
    signal_job_on,
)
from megatron_ext.launch.supervisor import Orders
from megatron_ext.runtime.environment import PRIVATE_VARIABLES, SECRET, current_environment, find_program
from megatron_ext.runtime.places import check_place, unwritable
from megatron_ext.runtime.signals import StopRequest, interrupts_handled

_ASK_SECONDS = 30.0
_POLL_SECONDS = 0.2
# Beginnings of names that its launcher puts on the command line by itself, with no escape.
_EXPORTED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


@dataclass(frozen=True)
class Target:
    """Where ranks are started: one for each slot of each host."""

    hosts: tuple[Host, ...]
    over_ssh: bool = True  # false: the one host is this machine
    master_port: int | None = None  # port of the rendezvous; None takes a free one

    @property
    def ranks(self) -> int:
        """Ranks over all hosts."""
        return sum(len(host.slots) for host in self.hosts)


def this_machine(ranks: int | None = None, *, master_port: int | None = None) -> Target:
    """This machine as a cluster of one host; by default a rank for each GPU, or one on a CPU."""
    slots = range(ranks or max(1, _visible_gpus()))
    return Target((Host("this machine", tuple(slots)),), over_ssh=False, master_port=master_port)


def launch(
    target: Target, config: RunConfig, *, worker_options: Sequence[str] = (), stop: StopRequest | None = None
) -> int:
    """Train the run on ``target`` and return its exit status.

    ``stop`` is told of the signals that arrive meanwhile, for a caller that has something to do after this run. Raises
    UserError if the data is wrong or the ranks cannot share every batch, and as ``start_ranks``.
    """
    # Said here, at once; starting ranks takes many seconds.
    check_run(config, target.ranks)
    check_data(config.data, seq_len=config.training.seq_len, vocab_size=config.model.vocab_size)
    with start_ranks(target, config, worker_options=worker_options) as ranks:
        return ranks.wait(stop or StopRequest())


def check_run(config: RunConfig, ranks: int) -> None:
    """Raise UserError where ``ranks`` cannot share every batch, or nothing can be written into the run's directory."""
    check_place(config.run_dir)
    data_size = data_parallel_size(ranks, tensor=config.parallel.tensor)
    for plan in config.possible_plans().values():
        check_batches_divide(plan, data_size)


def _visible_gpus() -> int:
    """GPUs that torch sees here; a device file does not make one: torch may be a CPU build, or the user hides some."""
    from megatron_ext.runtime.device import gpu_names  # torch takes seconds to load

    return len(gpu_names())


class Ranks:
    """A run's ranks, from their start until ``close``; a context manager that closes."""

    def __init__(self, orders: Orders, environment: Mapping[str, str], folder: "_Folder", output: Path | None) -> None:
        self._orders, self._folder = orders, folder
        with output.open("ab") if output is not None else nullcontext() as file:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-m", "megatron_ext.launch.supervisor"],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=None if file is None else subprocess.STDOUT,
                # Ctrl-C in a terminal goes to the command alone, which passes it on.
                start_new_session=True,
                env=environment,
            )
        self._say(json.dumps(asdict(orders)))

    def poll(self) -> int | None:
        """Exit status of the run (1 where a signal ended it), or None while it goes on.

        0 also where the ranks were asked to stop while they could not catch a signal yet, or not any more: before
        their first step, or after their last checkpoint.
        """
        status = self._supervisor.poll()
        return status if status is None or status >= 0 else 1

    def ask_to_stop(self) -> bool:
        """Ask every rank to finish its step, save and exit; whether the run has not ended yet."""
        self._say("stop")
        return self._supervisor.poll() is None

    def wait(self, stop: StopRequest) -> int:
        """Exit status of the run; SIGINT and SIGTERM that arrive meanwhile reach ``stop`` and all ranks."""

        def pass_on(number: int, _frame: FrameType | None) -> None:
            stop.receive(number)
            self._say("stop")

        with interrupts_handled(pass_on):
            while (status := self.poll()) is None:
                time.sleep(_POLL_SECONDS)
        return status

    def close(self) -> None:
        """Kill whatever is left, on every host, and remove what the launch has written."""
        if self._supervisor.poll() is None:
            signal_job_on(self._orders.hosts, self._orders.job, signal.SIGKILL)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._supervisor.pid, signal.SIGKILL)
        assert self._supervisor.stdin is not None
        with suppress(OSError):
            self._supervisor.stdin.close()
        self._supervisor.wait()
        self._folder.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _say(self, line: str) -> None:
        assert self._supervisor.stdin is not None
        with suppress(OSError, ValueError):
            self._supervisor.stdin.write(line.encode() + b"\n")
            self._supervisor.stdin.flush()


def start_ranks(
    target: Target, config: RunConfig, *, worker_options: Sequence[str] = (), output: Path | None = None
) -> Ranks:
    """Start a worker on each slot of ``target``, from the resolved ``config``, whose directory all hosts share.

    What the ranks print is appended to the file ``output``; without one it goes where this process prints. Raises
    UserError if pdsh or the launcher is not installed, or a host is not fit; every unfit host is named.
    """
    deepspeed = find_program("deepspeed")
    if deepspeed is None:
        raise UserError("the deepspeed launcher is not installed beside this Python; pip install deepspeed")
    if target.over_ssh and shutil.which("pdsh") is None:
        raise UserError("--hostfile needs pdsh, which is not installed here; install it (Debian: apt install pdsh)")
    job = secrets.token_hex(8)
    folder = _Folder(config.run_dir, job)
    try:
        file = folder.write("config.json", resolved_json(config))
        reports = _examine(target, config.cluster, [str(Path.cwd()), str(file)])
        variables = _variables(target, reports) | {JOB: job, SECRET: secrets.token_hex(32)}
        if target.over_ssh:
            environment = _prepare_hosts(variables, config.cluster, folder)
            where = _on_hosts(target, config.cluster, reports, folder)
        else:
            environment, where = variables, ["--num_gpus", str(target.ranks), "--master_addr", "127.0.0.1"]
        arguments = [str(file), "--directory", str(Path.cwd()), *worker_options]
        command = [
            *(sys.executable, deepspeed, *where, "--master_port", str(reports[0].port)),
            *("--no_local_rank", "--log_level", "critical", "--module", WORKER),
            *(map(remote_argument, arguments) if target.over_ssh else arguments),
        ]
        orders = Orders(
            job=job,
            hosts=[host.name for host in target.hosts] if target.over_ssh else [],
            command=command,
            folder=str(folder.path),
            silence_seconds=config.cluster.heartbeat_seconds,
        )
        return Ranks(orders, environment, folder, output)
    except BaseException:
        folder.remove()
        raise


class _Folder:
    """A folder of the run directory that all hosts can read and no other user, while a launch goes on."""

    def __init__(self, run_dir: Path, job: str) -> None:
        self.path = run_dir.absolute() / f".launch-{job}"
        self._made = None if run_dir.exists() else run_dir
        try:
            self.path.mkdir(parents=True, mode=0o700)
        except (OSError, ValueError) as error:
            raise unwritable(run_dir, error) from error

    def write(self, name: str, text: str) -> Path:
        """Write a file that no other user can read; its path."""
        path = self.path / name
        try:
            path.touch(mode=0o600, exist_ok=False)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise unwritable(self.path.parent, error) from error
        return path

    def remove(self) -> None:
        """Remove it, and the run directory where nothing else came to be in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._made is not None:
            with suppress(OSError):  # it holds a run by now
                self._made.rmdir()


def _examine(target: Target, cluster: ClusterConfig, paths: list[str]) -> list[HostReport]:
    """Ask every host at once whether the run can start there. Raises UserError with what each unfit host lacks."""
    names = [host.name for host in target.hosts]
    found: list[HostReport | str]
    if target.over_ssh:
        answers = ask_hosts(names, "report", [paths, target.master_port], seconds=_ASK_SECONDS)
        found = [_report_of(answer) for answer in answers]
    else:
        found = [replace(report(paths, target.master_port), gpus=_visible_gpus())]
    problems: list[str] = []
    reports: list[HostReport] = []
    for host, each in zip(target.hosts, found, strict=True):
        if isinstance(each, str):
            problems.append(each)
        else:
            reports.append(each)
            problems += _problems(host, each, cluster)
    if len({each.gpus > 0 for each in reports}) > 1:
        without = [host.name for host, each in zip(target.hosts, found, strict=True) if not getattr(each, "gpus", 1)]
        problems.append(f"{', '.join(without)}: no GPU, while other hosts have some")
    if not problems and reports[0].port is None:
        problems.append(f"{names[0]}: --master-port {target.master_port} is in use there; leave it out for a free one")
    if problems:
        raise UserError("the run cannot start on these hosts:\n  " + "\n  ".join(problems))
    return reports


def _report_of(answer: Answer) -> HostReport | str:
    """A host's report, or what is wrong with it."""
    if answer.status is None:
        return f"{answer.host}: no answer over ssh within {_ASK_SECONDS:.0f} s"
    if answer.status == NO_WAY:
        return f"{answer.host}: cannot be reached over ssh without a password ({answer.last_line or 'no reason given'})"
    if answer.status != 0:
        return f"{answer.host}: {sys.executable} does not run there as it does here ({answer.last_line})"
    return HostReport(**json.loads(answer.out.splitlines()[-1]))


def _problems(host: Host, found: HostReport, cluster: ClusterConfig) -> Iterator[str]:
    for path in found.missing:
        yield f"{host.name}: {path} is not there; the file system has to be shared"
    if cluster.interface is not None and cluster.interface not in found.addresses:
        yield f"{host.name}: no interface {cluster.interface} (cluster.interface); it has {', '.join(found.addresses)}"
    if found.gpus and max(host.slots) >= found.gpus:
        yield f"{host.name}: {max(host.slots) + 1} ranks are meant for it, but it has {found.gpus} GPU(s)"


def _variables(target: Target, reports: list[HostReport]) -> dict[str, str]:
    """The environment of the ranks, as far as this machine decides it."""
    variables = current_environment()
    if not reports[0].gpus:
        variables["DS_ACCELERATOR"] = "cpu"
        # Without this every rank starts a thread per core, and the ranks fight for the cores.
        threads = min(found.cores // len(host.slots) for host, found in zip(target.hosts, reports, strict=True))
        variables.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    # Empty is not the same as missing: the launcher would put its own directory there.
    own_root = [] if "site-packages" in PACKAGE_ROOT.parts else [str(PACKAGE_ROOT)]
    variables["PYTHONPATH"] = ":".join([*own_root, *filter(None, [variables.get("PYTHONPATH", "")])])
    return variables


def _prepare_hosts(variables: dict[str, str], cluster: ClusterConfig, folder: _Folder) -> dict[str, str]:
    """Write down what travels to the hosts, and return the environment of deepspeed's launcher."""
    forwarded = choose_variables(variables, cluster.environment)
    lines = {**forwarded.on_command_line, "PYTHONPATH": variables["PYTHONPATH"], JOB: variables[JOB]}
    private = json.dumps({**forwarded.in_private_file, SECRET: variables[SECRET]})
    lines[PRIVATE_VARIABLES] = str(folder.write("environment.json", private))
    file = folder.write("deepspeed_env", environment_file(lines))
    kept = {name: value for name, value in variables.items() if not name.startswith(_EXPORTED_BY_DEEPSPEED)}
    return kept | {
        "DS_ENV_FILE": str(file),
        "DS_ACCELERATOR": "cpu",  # of the launcher itself, which may run where there is no GPU
        "PYTHONPATH": variables["PYTHONPATH"],
        "PDSH_SSH_ARGS_APPEND": shlex.join(SSH_OPTIONS),
    }


def _on_hosts(target: Target, cluster: ClusterConfig, reports: list[HostReport], folder: _Folder) -> list[str]:
    """What deepspeed's launcher is told about where the ranks run."""
    slots = [f"{host.name} slots={max(host.slots) + 1}\n" for host in target.hosts]
    include = "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in target.hosts)
    return [
        *("--hostfile", str(folder.write("hostfile", "".join(slots))), "--include", include),
        # Without it, one host that is left by --include is taken for this machine.
        *("--force_multi", "--launcher", "pdsh", "--no_ssh_check"),
        *("--master_addr", _master_address(target, cluster, reports[0])),
    ]


def _master_address(target: Target, cluster: ClusterConfig, first: HostReport) -> str:
    """Address of the first host under which the other hosts find it."""
    if cluster.interface is not None:
        return first.addresses[cluster.interface][0]
    with suppress(OSError):
        known = {str(entry[4][0]) for entry in socket.getaddrinfo(target.hosts[0].name, None)}
        for address in first.reachable:
            if address in known:
                return address
    return next(iter(first.reachable), "127.0.0.1")
