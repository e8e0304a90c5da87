"""Starts the ranks on several hosts, through the deepspeed launcher over pdsh and ssh.

Whatever can be wrong with a host is asked before anything starts there. Nothing that a user wrote goes through the
remote shell but in a form in which the shell finds nothing to do: the run is a resolved config file on the shared file
system, the launcher works from ``/``, and the environment is a list of names (``runtime/forwarding.py``).
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
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megatron_ext.errors import UserError
from megatron_ext.runtime.environment import PRIVATE_VARIABLES, SUPERVISOR
from megatron_ext.runtime.forwarding import choose_variables, environment_file, remote_argument
from megatron_ext.runtime.host_facts import HostFacts, is_local
from megatron_ext.runtime.host_guard import GuardSpec
from megatron_ext.runtime.hostfile import Host
from megatron_ext.runtime.launcher import deepspeed_program
from megatron_ext.runtime.remote import PACKAGE_ROOT, SSH_OPTIONS, Answer, ask_hosts
from megatron_ext.runtime.signals import StopRequest
from megatron_ext.runtime.sweep import JOB, WORKER

_ASK_SECONDS = 30.0
_POLL_SECONDS = 0.2
_EXPORTED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Beginnings of names that its launcher puts on the command line by itself, with no escape."""


@dataclass(frozen=True)
class HostOptions:
    """Where the ranks run, and what travels there."""

    hosts: tuple[Host, ...]
    environment: tuple[str, ...]
    """Names and globs of variables that travel."""

    interface: str | None
    silence_seconds: float
    master_port: int | None = None

    @property
    def ranks(self) -> int:
        """Ranks over all hosts."""
        return sum(len(host.slots) for host in self.hosts)


def launch_on_hosts(
    options: HostOptions,
    config: Mapping[str, object],
    run_dir: Path,
    *,
    worker_options: Sequence[str] = (),
    stop: StopRequest | None = None,
) -> int:
    """Run the training worker on the hosts and return the run's exit status.

    Args:
        options: where and how.
        config: the resolved config.
        run_dir: the run's directory, on a file system that all hosts share.
        worker_options: further options of the worker.
        stop: is told of the signals that arrive meanwhile.

    Raises:
        UserError: pdsh or the launcher is not installed, or a host is not fit; every unfit host is named.
    """
    if shutil.which("pdsh") is None:
        raise UserError("--hostfile needs pdsh, which is not installed here; install it (Debian: apt install pdsh)")
    deepspeed_program()
    job = secrets.token_hex(8)
    with _launch_folder(run_dir, job) as shared, _private_folder() as private:
        _write_private(shared / "config.json", json.dumps(config))
        facts = _examine(options, shared)
        command, environment = _prepare(options, facts, job=job, shared=shared, private=private)
        arguments = [str(shared / "config.json"), "--directory", str(Path.cwd()), *worker_options]
        spec = GuardSpec(
            job=job,
            hosts=[host.name for host in options.hosts],
            command=[*command, "--module", WORKER, *map(remote_argument, arguments)],
            environment=environment,
            folders=[str(shared), str(private)],
            silence_seconds=options.silence_seconds,
        )
        _write_private(private / "guard.json", json.dumps(asdict(spec)))
        return _guarded(private / "guard.json", StopRequest() if stop is None else stop)


@contextmanager
def _launch_folder(run_dir: Path, job: str) -> Iterator[Path]:
    """A folder that all hosts can read and no other user; gone when the command ends."""
    folder = run_dir.absolute() / f".launch-{job}"
    made = not run_dir.exists()
    try:
        folder.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written: {error}; see output_dir") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            with suppress(OSError):  # it holds a run by now
                run_dir.rmdir()


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder of this machine that no other user can read; gone when the command ends."""
    folder = Path(tempfile.mkdtemp(prefix="megatron-ext-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _examine(options: HostOptions, shared: Path) -> list[HostFacts]:
    """Ask every host at once whether the run can start there.

    Raises:
        UserError: of what each unfit host lacks.
    """
    names = [host.name for host in options.hosts]
    paths = [str(Path.cwd()), str(shared / "config.json")]
    answers = ask_hosts(names, "megatron_ext.runtime.host_facts", [paths, options.master_port], seconds=_ASK_SECONDS)
    facts, problems = [], []
    for host, answer in zip(options.hosts, answers, strict=True):
        found = _facts_of(answer)
        if isinstance(found, str):
            problems.append(found)
            continue
        facts.append(found)
        problems += _problems(host, found, options)
    if len({found.gpus > 0 for found in facts}) > 1:
        without = [host.name for host, found in zip(options.hosts, facts, strict=False) if not found.gpus]
        problems.append(f"{', '.join(without)}: no GPU, while other hosts have some")
    if not problems and facts[0].port is None:
        problems.append(f"{names[0]}: --master-port {options.master_port} is in use there; leave it out for a free one")
    if problems:
        raise UserError("the run cannot start on these hosts:\n  " + "\n  ".join(problems))
    return facts


def _facts_of(answer: Answer) -> HostFacts | str:
    """A host's facts, or what is wrong with it."""
    if answer.status is None:
        return f"{answer.host}: no answer over ssh within {_ASK_SECONDS:.0f} s"
    if answer.status == 255:
        return f"{answer.host}: cannot be reached over ssh without a password ({answer.last_line or 'no reason given'})"
    if answer.status != 0:
        return f"{answer.host}: {sys.executable} does not run there as it does here ({answer.last_line})"
    return HostFacts(**json.loads(answer.out.splitlines()[-1]))


def _problems(host: Host, facts: HostFacts, options: HostOptions) -> Iterator[str]:
    for path in facts.missing:
        yield f"{host.name}: {path} is not there; the file system has to be shared"
    if options.interface is not None and options.interface not in facts.addresses:
        yield f"{host.name}: no interface {options.interface} (cluster.interface); it has {', '.join(facts.addresses)}"
    if facts.gpus and max(host.slots) >= facts.gpus:
        yield f"{host.name}: the hostfile gives it {max(host.slots) + 1} slots, but it has {facts.gpus} GPUs"


def _prepare(
    options: HostOptions, facts: list[HostFacts], *, job: str, shared: Path, private: Path
) -> tuple[list[str], dict[str, str]]:
    """The launcher's command line, but for the worker, and its environment."""
    on_cpu = not facts[0].gpus
    variables = dict(os.environ)
    if on_cpu:
        variables["DS_ACCELERATOR"] = "cpu"
        threads = min(found.cores // len(host.slots) for host, found in zip(options.hosts, facts, strict=True))
        variables.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    forwarded = choose_variables(variables, options.environment)
    # Empty is not the same as missing: the launcher would put its own directory there.
    own_root = [] if "site-packages" in PACKAGE_ROOT.parts else [str(PACKAGE_ROOT)]
    python_path = ":".join([*own_root, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    lines = {**forwarded.on_command_line, "PYTHONPATH": python_path, JOB: job}
    if forwarded.in_private_file:
        _write_private(shared / "environment.json", json.dumps(forwarded.in_private_file))
        lines[PRIVATE_VARIABLES] = str(shared / "environment.json")
    _write_private(private / "deepspeed_env", environment_file(lines))
    slots = [f"{host.name} slots={max(host.slots) + 1}\n" for host in options.hosts]
    _write_private(private / "hostfile", "".join(slots))
    include = "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in options.hosts)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_EXPORTED_BY_DEEPSPEED)} | {
        "DS_ENV_FILE": str(private / "deepspeed_env"),
        "DS_ACCELERATOR": "cpu",  # of the launcher itself, which may run where there is no GPU
        "PYTHONPATH": python_path,
        "PDSH_SSH_ARGS_APPEND": shlex.join(SSH_OPTIONS),
    }
    environment.pop(SUPERVISOR, None)
    command = [
        *(sys.executable, str(deepspeed_program()), "--hostfile", str(private / "hostfile"), "--include", include),
        # Without it, one host that is left by --include is taken for this machine.
        *("--force_multi", "--launcher", "pdsh", "--no_ssh_check", "--no_local_rank", "--log_level", "critical"),
        *("--master_addr", _master_address(options, facts[0]), "--master_port", str(facts[0].port)),
    ]
    return command, environment


def _master_address(options: HostOptions, first: HostFacts) -> str:
    """Address of the first host under which the other hosts find it."""
    if options.interface is not None:
        return first.addresses[options.interface][0]
    with suppress(OSError):
        known = {str(entry[4][0]) for entry in socket.getaddrinfo(options.hosts[0].name, None)}
        for address in first.reachable:
            if address in known and not is_local(address):
                return address
    return next(iter(first.reachable), "127.0.0.1")


def _guarded(spec: Path, stop: StopRequest) -> int:
    """Start the guard, pass signals on to it, and wait for its exit status."""
    guard = subprocess.Popen(
        [sys.executable, "-m", "megatron_ext.runtime.host_guard", str(spec)],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": f"{PACKAGE_ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")},
    )
    assert guard.stdin is not None
    pipe = guard.stdin

    def pass_on(number: int, _frame: FrameType | None) -> None:
        stop.receive(number)
        with suppress(OSError, ValueError):
            pipe.write(b"stop\n")
            pipe.flush()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while (status := guard.poll()) is None:
            time.sleep(_POLL_SECONDS)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        with suppress(OSError):
            pipe.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(guard.pid, signal.SIGKILL)
    return status if status >= 0 else 1


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
