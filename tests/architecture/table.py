"""The table of docs/architecture.md: layers, doors, and limits."""

from collections.abc import Mapping

# A module imports only from smaller numbers; same number: strangers. errors and base are below everything: the one
# exception that means "the input is wrong", and what every section of a config is made of.
LAYERS: Mapping[str, int] = {
    "errors": -2,
    "base": -1,
    "text": -1,
    "curriculum": 0,
    "config": 1,
    "runtime": 2,
    "ops": 3,
    "parallel": 3,
    "data": 4,
    "model": 4,
    "engine": 5,
    "metrics": 6,
    "checkpoint": 7,
    "evaluate": 8,
    "build": 9,
    "incidents": 10,
    "trainer": 11,
    "dry_run": 11,
    "launch": 12,
    "analysis": 12,
    "worker": 13,
    "experiments": 13,
    "cli": 14,
    "__main__": 15,
}

# What is behind a door, and the parts that may open it. The longest prefix that fits decides.
DOORS: Mapping[str, frozenset[str]] = {
    "os.environ": frozenset({"runtime"}),
    "os.environb": frozenset({"runtime"}),
    "os.getenv": frozenset({"runtime"}),
    "os.putenv": frozenset({"runtime"}),
    # runtime holds the programs that run on other hosts.
    "sys.argv": frozenset({"cli", "worker", "__main__", "runtime", "launch"}),
    "argparse": frozenset({"cli", "worker"}),
    "typer": frozenset({"cli"}),
    "torch.cuda": frozenset({"runtime"}),
    "torch.utils.cpp_extension": frozenset({"ops"}),
    "deepspeed": frozenset({"engine"}),
    # Reads the files of ZeRO 3 without an engine.
    "deepspeed.utils.zero_to_fp32": frozenset({"checkpoint"}),
    "megatron.core.parallel_state": frozenset({"parallel"}),
    "megatron.core.tensor_parallel": frozenset({"parallel"}),
    # The linear layers and the embedding are what a model is made of; groups, mappings and streams are not.
    "megatron.core.tensor_parallel.layers": frozenset({"parallel", "model"}),
    "megatron.core.datasets": frozenset({"data"}),
    "megatron.core.models": frozenset({"model"}),
    "megatron.core.transformer": frozenset({"model"}),
    "megatron.core.fusions": frozenset({"model"}),
    # Everything else of megatron-core, and the package itself.
    "megatron": frozenset({"parallel", "data", "model"}),
}

# Parts that never import torch or what imports it, not even inside a function.
TORCH_FREE = frozenset({"errors", "base", "text", "config", "curriculum"})
# Modules that do not import it when they are imported (a function may).
TORCH_FREE_AT_IMPORT = (
    "__init__",
    "errors",
    "base",
    "text",
    "config",
    "curriculum",
    "cli",
    "__main__",
    "model.presets",
    "model.counts",
)
IMPORTS_TORCH = frozenset({"torch", "deepspeed", "megatron", "transformers", "lm_eval", "tensorboard"})

# Parts that people import from their own programs: their __init__ re-exports what is public.
LIBRARIES = frozenset({"curriculum"})

CUDA_LITERALS_IN = frozenset({"runtime", "ops"})
NO_ITEM_IN = frozenset({"trainer", "engine.deepspeed_engine"})

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Not counted for a typer command: its parameters are the options of the command line.
MAX_PARAMETERS = 7
