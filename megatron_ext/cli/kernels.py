"""``megatron-ext kernels``: build the fused kernels ahead of time, and measure them."""

import json
import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_ext.cli.common import AsJson

if TYPE_CHECKING:
    from megatron_ext.ops.building.recipe import Backend

kernels_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Fused kernels: build them ahead of time, or measure them.\n\nExample: megatron-ext kernels build",
)


@kernels_app.command("build")
def build(
    *,
    cpu: Annotated[bool, typer.Option("--cpu", help="Build the kernels for the CPU.")] = False,
    cuda: Annotated[bool, typer.Option("--cuda", help="Build the kernels for NVIDIA GPUs.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Build also what is there already.")] = False,
) -> None:
    """Compile the fused kernels into the cache, so that no run has to; without options, all that can be built here.

    CUDA kernels are compiled for TORCH_CUDA_ARCH_LIST, else for the GPUs present, else for A100, H100 and B200.
    MEGATRON_EXT_KERNEL_CACHE names the cache, by default ~/.cache/megatron-ext/kernels.

    Example: megatron-ext kernels build --cuda --force
    """
    from megatron_ext.ops.building.recipe import CPU, CUDA
    from megatron_ext.ops.building.toolchain import KernelsUnavailableError

    everything = not (cpu or cuda)
    if cpu or everything:
        typer.echo(_built(CPU, force=force))
    if cuda:
        typer.echo(_built(CUDA, force=force))
    elif everything:
        try:
            typer.echo(_built(CUDA, force=force))
        except KernelsUnavailableError as error:
            typer.echo(f"cuda: not built: {error}")


def _built(backend: "Backend", *, force: bool) -> str:
    from megatron_ext.ops.building.builder import build_library, cached_library
    from megatron_ext.ops.building.recipe import CUDA, recipe_for
    from megatron_ext.runtime.environment import kernel_environment

    devices = []
    if backend == CUDA:
        from megatron_ext.runtime.device import compute_capabilities

        devices = compute_capabilities()
    environment = kernel_environment()
    recipe = recipe_for(backend, environment, devices)
    library = None if force else cached_library(recipe, environment.cache)
    start = time.monotonic()
    if library is None:
        library = build_library(recipe, environment.cache, jobs=environment.jobs, force=force)
    how = f"built in {time.monotonic() - start:.0f} s" if library.built_now else "there already"
    targets = f" for {', '.join(library.architectures)}" if library.architectures else ""
    return f"{backend}: {how}{targets}: {library.path}"


@kernels_app.command("bench")
def bench(
    *,
    op: Annotated[
        list[str] | None, typer.Option("--op", help="Operation to measure; may be repeated. Default: all.")
    ] = None,
    sizes: Annotated[
        Literal["gpt2", "large", "small"],
        typer.Option(help="A micro-batch of GPT-2 117M, what fills a large GPU, or what takes no time."),
    ] = "gpt2",
    dtype: Annotated[Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Of activations.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of which the median is taken.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of each implementation in a round.")] = 0.1,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Whether torch.compile takes part.")] = True,
    as_json: AsJson = False,
) -> None:
    """Measure the fused kernels: GB/s, share of the rate at which the device copies, ratio to PyTorch and others.

    On a GPU in bfloat16 by default, against PyTorch, torch.compile and, where installed, apex, Liger and flash-attn; on
    a CPU in float32. Ratios say how many times as long the others took.

    Example: megatron-ext kernels bench --sizes large --json
    """
    from megatron_ext.errors import UserError
    from megatron_ext.ops.bench.figures import OPERATIONS, cases, figures, table
    from megatron_ext.ops.bench.figures import as_json as to_json
    from megatron_ext.ops.bench.measure import Effort, copy_rate, measure
    from megatron_ext.ops.building.recipe import CPU, CUDA
    from megatron_ext.ops.loading import load_operators
    from megatron_ext.runtime.device import gpu_names, select_device

    unknown = sorted(set(op or ()) - set(OPERATIONS))
    if unknown:
        raise UserError(f"--op {unknown[0]} is none of {', '.join(OPERATIONS)}")
    device = select_device(0)
    load_operators(CUDA if device.is_gpu else CPU)
    effort = Effort(rounds=rounds, seconds=seconds, compiled=compiled, cold_bytes=2**20 if sizes == "small" else 2**29)
    rate = copy_rate(device, effort)
    measured, rows = [], []
    for case in cases(sizes, dtype or ("bfloat16" if device.is_gpu else "float32")):
        if op is None or case.op in op:
            measured.append(measure(case, device, effort))
            rows += figures(measured[-1], copy_bytes_per_second=rate)
    name = gpu_names()[0] if device.is_gpu else "CPU"
    if as_json:
        typer.echo(json.dumps(to_json(measured, rows, copy_bytes_per_second=rate, device=name), indent=1))
        return
    typer.echo(f"{name}, copies {rate / 1e9:.1f} GB/s\n{table(rows)}")
    for one in measured:
        for name, why in one.failures.items():
            typer.echo(f"{one.case}: {name} failed: {why}")
