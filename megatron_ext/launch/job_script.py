"""The batch script of a SLURM job: what is asked of SLURM, checked, and the template (templates/train.sh) filled in.

Any text becomes one word of bash, or one value of an #SBATCH line.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final, Literal

from megatron_ext.errors import UserError

Containers = Literal["pyxis", "apptainer"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Bytes; sbatch reads an argument of an #SBATCH line into a buffer of 1 KiB in some releases.
_LONGEST_DIRECTIVE = 1000
_EXTRA = re.compile(r"[a-z][a-z0-9-]*")
# Options of sbatch that are not free -> what decides them.
_DECIDED: Final = {
    "array": "--array",
    "dependency": "--dependency",
    "nodes": "--nodes",
    "ntasks": "--nodes and --tasks-per-node",
    "ntasks-per-node": "--tasks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "partition": "--partition",
    "time": "--time",
    "account": "--account",
    "signal": "--signal-seconds",
    "output": "the run directory",
    "error": "the run directory",
    "open-mode": "the run directory",
    "requeue": "--chain",
    "no-requeue": "--chain",
    "chdir": "the working directory of this command",
    "wrap": "the script",
    "parsable": "this command",
    "test-only": "this command",
}
_LEAD_SECONDS = 300  # between the signal and the time limit, where the limit is long enough
_GRID_SECONDS = 60  # SLURM may send the signal this much earlier
_MOST_LEAD = 65535 - _GRID_SECONDS


def word(text: str) -> str:
    """``text`` as one word of bash that stands for exactly it, on one line. Raises UserError for a null character."""
    if "\0" in text:
        raise UserError(f"{text!r} holds a null character, which no file name or argument can; remove it")
    if not _CONTROL.search(text):
        return shlex.quote(text)
    return f"$'{''.join(map(_escaped, text))}'"


def _escaped(character: str) -> str:
    if _CONTROL.match(character):
        # Octal with all three digits: it ends there whatever follows.
        return f"\\{ord(character):03o}"
    return f"\\{character}" if character in "\\'" else character


def words(texts: Iterable[str]) -> str:
    """Several words."""
    return " ".join(map(word, texts))


def directive(option: str, value: str | None = None) -> str:
    """The #SBATCH line of ``--option``, or ``--option=value``, from which sbatch reads exactly the value.

    sbatch takes a backslash before the next character as that character, also in quotes, and ends an unquoted value at
    white space or "#". Raises UserError if the value holds a line break or another control character, or is too long
    for sbatch.
    """
    if value is None:
        return f"#SBATCH --{option}"
    if _CONTROL.search(value):
        raise UserError(f"--{option} is {value!r}: SLURM takes no line breaks and control characters here; remove them")
    if len(value.encode(errors="surrogateescape")) > _LONGEST_DIRECTIVE:
        raise UserError(f"--{option} is {value[:60]!r}...: longer than sbatch's {_LONGEST_DIRECTIVE} bytes")
    if re.fullmatch(r"[\w./:,@%+=-]+", value, flags=re.ASCII):
        return f"#SBATCH --{option}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{escaped}"'


@dataclass(frozen=True)
class Resources:
    """What a job occupies."""

    nodes: int = 1
    tasks_per_node: int = 1  # ranks on each node
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    # Limit in a form that sbatch takes: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS...
    time: str | None = None
    # The run is stopped this long before the limit; None: five minutes, of a short limit a tenth.
    signal_seconds: int | None = None
    extra: tuple[str, ...] = ()  # further options of sbatch, ``key=value`` or ``key``

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Container:
    """An image in which the ranks run."""

    image: str
    runtime: Containers = "pyxis"
    mounts: tuple[str, ...] = ()  # paths that are the same inside

    def srun_options(self) -> tuple[str, ...]:
        """What srun is given."""
        if self.runtime != "pyxis":
            return ()
        mounts = ",".join(f"{path}:{path}" for path in self._mounts())
        return (f"--container-image={self.image}", *((f"--container-mounts={mounts}",) if mounts else ()))

    def prefix(self) -> tuple[str, ...]:
        """What stands before the command of a rank."""
        if self.runtime != "apptainer":
            return ()
        mounts = tuple(f"--bind={path}:{path}" for path in self._mounts())
        return ("apptainer", "exec", "--nv", *mounts, self.image)

    def _mounts(self) -> tuple[str, ...]:
        for path in self.mounts:
            if re.search(r"[:,]", path):
                raise UserError(f"{path!r} is mounted into the container: {self.runtime} takes no ':' and ',' in it")
        return self.mounts


@dataclass(frozen=True)
class TrainingJob:
    """One job, or one array of jobs that each train another run."""

    name: str
    # Absolute; more than one are an array. Each holds ``slurm/config.json`` when the job begins.
    run_dirs: tuple[Path, ...]
    work_dir: Path  # where relative paths of the configs start; absolute
    output: Path  # absolute directory of what the batch script prints
    python: str  # the interpreter that the ranks start; in a container the container's
    resources: Resources = Resources()
    container: Container | None = None
    task_ids: tuple[int, ...] = ()  # number of each run's task in the array; empty: one run without an array
    at_once: int | None = None  # most tasks of the array that run at a time
    dependency: str | None = None
    attempts: int = 1  # of a run that fails, each from its newest checkpoint
    requeue: bool = True  # whether a run that a signal stopped asks for another turn

    def script(self) -> str:
        """The batch script. Raises UserError if an option is none that SLURM can be given."""
        return self._filled(
            "train.sh",
            DIRECTIVES="\n".join(self._directives()),
            RUN_DIRS="\n".join(self._run_dirs()),
            ATTEMPTS=str(self.attempts),
            REQUEUE=str(int(self.requeue)),
            ARRAY=str(int(bool(self.task_ids))),
        )

    def command_script(self, arguments: Sequence[str], *, name: str, dependency: str) -> str:
        """The script of a small job that calls this program with ``arguments`` where its ranks would run."""
        own = {"nodes": "1", "ntasks": "1", "time": "30", "dependency": dependency, "output": self._output("%j.out")}
        asked = {"job-name": _label(name), "partition": self.resources.partition, "account": self.resources.account}
        lines = [directive(option, value) for option, value in (asked | own).items() if value is not None]
        return self._filled("command.sh", DIRECTIVES="\n".join(lines), ARGUMENTS=words(arguments))

    def _filled(self, template: str, **values: str) -> str:
        text = resources.files("megatron_ext.launch").joinpath("templates", template).read_text(encoding="utf-8")
        container = self.container
        values |= {
            "WORK_DIR": word(str(self.work_dir)),
            "PYTHON": word(self.python),
            "SRUN_OPTIONS": words(container.srun_options() if container else ()),
            "CONTAINER": words(container.prefix() if container else ()),
        }
        # All at once: a value that looks like a place is not filled in.
        return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], text)

    def names(self, number: str) -> list[str]:
        """The job of each run, where the job or array got this number."""
        return [f"{number}_{task}" for task in self.task_ids] or [number]

    def _run_dirs(self) -> Iterator[str]:
        for number, path in zip(self.task_ids or (0,), self.run_dirs, strict=True):
            yield f"    [{number}]={word(str(path))}"

    def _directives(self) -> Iterator[str]:
        asked = self.resources
        yield directive("job-name", _label(self.name))
        yield directive("nodes", str(asked.nodes))
        yield directive("ntasks-per-node", str(asked.tasks_per_node))
        for option, value in (
            ("gpus-per-node", asked.gpus_per_node),
            ("cpus-per-task", asked.cpus_per_task),
            ("partition", asked.partition),
            ("account", asked.account),
            ("time", asked.time),
            ("array", self._array()),
            ("dependency", self.dependency),
        ):
            if value is not None:
                yield directive(option, str(value))
        yield directive("requeue")
        yield directive("signal", f"B:USR1@{lead_seconds(asked)}")
        yield directive("output", self._output("%A_%a.out" if self.task_ids else "%j.out"))
        yield directive("open-mode", "append")
        for option in asked.extra:
            yield _extra(option)

    def _array(self) -> str | None:
        if not self.task_ids:
            return None
        limit = f"%{self.at_once}" if self.at_once else ""
        return ",".join(map(str, self.task_ids)) + limit

    def _output(self, file: str) -> str:
        folder = str(self.output)
        # A backslash switches the replacement of %j off, and a line break cannot be written there.
        if "\\" in folder or _CONTROL.search(folder):
            return "/dev/null"
        return folder.replace("%", "%%") + "/" + file


def _label(name: str) -> str:
    """A name that only people read, in a form that SLURM takes."""
    return _CONTROL.sub("_", name)[:200]


def lead_seconds(asked: Resources) -> int:
    """How long before its limit a job is signaled. Raises UserError if SLURM takes no such limit, or it is at once."""
    limit = None if asked.time is None else limit_seconds(asked.time)
    lead = asked.signal_seconds
    if lead is None:
        return _LEAD_SECONDS if limit is None else max(1, min(_LEAD_SECONDS, limit // 10))
    if not 1 <= lead <= _MOST_LEAD:
        raise UserError(f"--signal-seconds is {lead}: SLURM takes 1 to {_MOST_LEAD}")
    if limit is not None and lead >= limit:
        raise UserError(
            f"--signal-seconds is {lead} and --time {asked.time}: the run would be stopped at once; raise --time"
        )
    return lead


def limit_seconds(text: str) -> int | None:
    """Seconds of a time limit as sbatch reads it; None without a limit. Raises UserError if it would not take it."""
    if text.upper() in {"UNLIMITED", "INFINITE", "-1", "0"}:
        return None
    days, dash, rest = text.rpartition("-")
    numbers = [int(part) for part in rest.split(":") if part.isascii() and part.isdigit()]
    well_formed = len(numbers) == rest.count(":") + 1 <= 3 and (not dash or (days.isascii() and days.isdigit()))
    if not well_formed:
        raise UserError(f"--time is {text!r}: write MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
    # Behind days the first number is hours; alone it is minutes, also before seconds.
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def _extra(option: str) -> str:
    key, separator, value = option.removeprefix("--").partition("=")
    if not _EXTRA.fullmatch(key):
        raise UserError(f"--sbatch {option!r}: write an option of sbatch as KEY=VALUE or KEY, for example qos=high")
    if key in _DECIDED:
        raise UserError(f"--sbatch {option!r}: {_DECIDED[key]} decides that")
    return directive(key, value if separator else None)


def parse_array(text: str) -> tuple[tuple[int, ...], int | None]:
    """Task numbers of an array as sbatch writes them (``0-7``, ``1,3,9-20:2``, ``0-7%4``), and how many run at once.

    Raises UserError if it is in no form that sbatch takes.
    """
    tasks, percent, limit = text.partition("%")
    numbers: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6})(?::(\d{1,6}))?)?", part, flags=re.ASCII)
        if match is None or match[3] == "0" or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(f"--array is {text!r}: write numbers and ranges, for example 0-7, 1,3,5 or 0-31%4")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))
    if percent and not (limit.isascii() and limit.isdigit() and int(limit)):
        raise UserError(f"--array is {text!r}: what follows % is how many tasks run at once, for example 0-31%4")
    return tuple(sorted(set(numbers))), int(limit) if percent else None
