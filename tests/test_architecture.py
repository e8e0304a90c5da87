"""The code keeps to docs/architecture.md; and every rule fails on a planted violation."""

from pathlib import Path

import pytest

from tests.architecture.graph import check
from tests.architecture.source import Module

ROOT = Path(__file__).parents[1]
PLACES = ("megatron_ext", "tests", "launch", "benchmarks", ".ci")


def read_tree() -> list[Module]:
    files = [path for place in PLACES for path in sorted((ROOT / place).rglob("*.py"))]
    return [Module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files]


def broken_rules(path: str, source: str, **others: str) -> set[str]:
    """Rules that ``source`` at ``path`` breaks; ``others`` are further modules, ``a__b`` for megatron_ext/a/b.py."""
    modules = [Module(path, source)]
    modules += [Module(f"megatron_ext/{name.replace('__', '/')}.py", text) for name, text in others.items()]
    return {violation.rule for violation in check(modules)}


def test_the_tree_keeps_to_the_architecture() -> None:
    modules = read_tree()
    assert sum(module.in_package for module in modules) > 10, "the package was not found"
    violations = check(modules)
    assert not violations, "\n" + "\n".join(map(str, violations))


PLANTED = [
    # rule, path inside the package, source
    ("layers", "config/x.py", "from megatron_ext.runtime.device import Device"),
    ("layers", "data/x.py", "from megatron_ext.model import gpt"),
    ("layers", "data/x.py", "def f():\n    import megatron_ext.engine.step"),
    ("layers", "curriculum/x.py", "from megatron_ext import parallel"),
    ("layers", "errors.py", "import megatron_ext.config.run"),
    ("layers", "runtime/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import megatron_ext.cli.app"),
    ("layers", "trainers/x.py", "x = 1"),
    ("doors", "trainer.py", "import torch\nx = torch.cuda.is_available()"),
    ("doors", "engine/x.py", "from torch import cuda"),
    ("doors", "model/x.py", "import torch as t\nx = t.cuda.device_count()"),
    ("doors", "data/x.py", "import os\nx = os.environ['RANK']"),
    ("doors", "data/x.py", "from os import environ"),
    ("doors", "cli/x.py", "import os\nx = os.getenv('RANK')"),
    ("doors", "checkpoint/x.py", "import deepspeed"),
    ("doors", "cli/x.py", "def f():\n    from deepspeed.launcher import runner"),
    ("doors", "engine/x.py", "from megatron.core import parallel_state"),
    ("doors", "model/x.py", "from megatron.core.parallel_state import get_tensor_model_parallel_rank"),
    ("doors", "model/x.py", "from megatron.core.tensor_parallel.random import get_cuda_rng_tracker"),
    ("doors", "model/x.py", "from megatron.core import tensor_parallel\nx = tensor_parallel.mappings"),
    ("doors", "data/x.py", "from megatron.core.tensor_parallel.layers import VocabParallelEmbedding"),
    ("doors", "model/x.py", "from megatron.core.datasets.gpt_dataset import GPTDataset"),
    ("doors", "parallel/x.py", "from megatron.core.models.gpt import GPTModel"),
    ("doors", "engine/x.py", "import megatron.core"),
    ("doors", "engine/x.py", "from torch.utils.cpp_extension import load"),
    ("doors", "trainer.py", "import sys\nx = sys.argv[1]"),
    ("doors", "runtime/x.py", "import argparse"),
    ("torch-free", "config/x.py", "def f():\n    import torch"),
    ("torch-free", "curriculum/x.py", "from megatron.core import x"),
    ("relative-import", "config/x.py", "from .run import RunConfig"),
    ("package-init", "config/__init__.py", '"""Doc."""\nfrom megatron_ext.config.run import RunConfig'),
    ("package-init", "config/__init__.py", '__version__ = "1"'),
    ("package-init", "curriculum/__init__.py", "import numpy"),
    ("package-init", "curriculum/__init__.py", "x = 1"),
    ("file-length", "config/x.py", "x = 1\n" * 401),
    ("function-length", "config/x.py", "def f():\n" + "    x = 1\n" * 60),
    ("function-length", "config/x.py", "class A:\n    async def f(self):\n" + "        x = 1\n" * 60),
    ("parameters", "config/x.py", "def f(a, b, c, d, /, e, f, *, g, h): ..."),
    ("parameters", "cli/x.py", "def command_of(a, b, c, d, e, f, g, h): ..."),
    ("parameters", "data/x.py", "def command(a, b, c, d, e, f, g, h): ..."),
    ("global", "config/x.py", "def f():\n    global x\n    x = 1"),
    ("get-args", "engine/x.py", "def f():\n    return get_args().lr"),
    ("get-args", "engine/x.py", "import megatron.training as m\nx = m.get_args()"),
    ("module-name", "engine/utils.py", "x = 1"),
    ("device", "engine/x.py", "def f(t):\n    return t.cuda()"),
    ("device", "engine/x.py", "import torch\nx = torch.device('cuda:0')"),
    ("device", "model/x.py", "x = 'cuda'"),
    ("item", "trainer.py", "def f(loss):\n    return loss.item()"),
    ("item", "engine/deepspeed_engine.py", "def f(loss):\n    return loss.sum().item()"),
    ("torch-at-import", "cli/app.py", "import torch"),
    ("torch-at-import", "model/presets.py", "from torch import nn"),
]


@pytest.mark.parametrize(("rule", "path", "source"), PLANTED)
def test_a_planted_violation_is_found(rule: str, path: str, source: str) -> None:
    assert rule in broken_rules(f"megatron_ext/{path}", source)


TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "

KEPT = [
    ("config/x.py", "from megatron_ext.errors import UserError"),
    (
        "config/x.py",
        TYPING + "from megatron_ext.config.run import RunConfig",
    ),
    ("trainer.py", "from megatron_ext.engine.step import step\nfrom megatron_ext.curriculum.plan import TrainingPlan"),
    ("runtime/x.py", "import os, torch\nx = os.environ.get('RANK'), torch.cuda.device_count(), torch.device('cuda')"),
    ("data/x.py", "from megatron.core.datasets.indexed_dataset import IndexedDataset"),
    ("model/x.py", "from megatron.core.transformer.spec_utils import ModuleSpec"),
    ("model/x.py", "from megatron.core.tensor_parallel.layers import ColumnParallelLinear"),
    ("parallel/x.py", "from megatron.core import parallel_state, tensor_parallel"),
    ("cli/x.py", "def f():\n    import torch\n    from megatron_ext.trainer import train"),
    ("config/x.py", "from typing import get_args, Literal\nx = get_args(Literal['a'])"),
    ("config/x.py", "import typing\nx = typing.get_args(int)"),
    ("config/__init__.py", '"""Doc."""'),
    ("curriculum/__init__.py", "from megatron_ext.curriculum.plan import x\n__all__ = ['x']"),
    ("__init__.py", '"""Doc."""\n__version__ = "1"'),
    ("config/x.py", "class A:\n    def f(self, a, b, c, d, e, f, g): ..."),
    ("config/x.py", "def f():\n" + "    x = 1\n" * 59),
    ("cli/x.py", "def command(a, b, c, d, e, f, g, h): ..."),
    ("cli/x.py", "@tokenizer_app.command('train')\ndef f(a, b, c, d, e, f, g, h): ..."),
    ("worker.py", "import argparse\nfrom megatron_ext.trainer import train"),
    ("metrics/x.py", "def f(loss):\n    return loss.item()"),
    ("engine/x.py", "def f(typer, os):\n    return typer.name, os.environ"),
    ("cli/x.py", "text = 'cuda: not found'\nwhich = environment.cuda"),
]


@pytest.mark.parametrize(("path", "source"), KEPT)
def test_what_is_allowed_is_not_reported(path: str, source: str) -> None:
    assert broken_rules(f"megatron_ext/{path}", source) == set()


def test_torch_is_found_through_a_chain_of_modules_but_not_through_a_lazy_import() -> None:
    app = "from megatron_ext.trainer import loop"
    assert "torch-at-import" in broken_rules("megatron_ext/cli/app.py", app, trainer="import torch")
    assert broken_rules("megatron_ext/cli/app.py", f"def f():\n    {app}", trainer="import torch") == set()
    assert broken_rules("megatron_ext/cli/app.py", TYPING + app, trainer="import torch") == set()


def test_a_package_between_is_part_of_the_chain() -> None:
    source = "import megatron_ext.engine.pure"
    others = {"engine____init__": "import torch", "engine__pure": "x = 1"}
    modules = [Module("megatron_ext/cli/app.py", source)]
    modules += [Module("megatron_ext/engine/__init__.py", others["engine____init__"])]
    modules += [Module("megatron_ext/engine/pure.py", others["engine__pure"])]
    assert "torch-at-import" in {violation.rule for violation in check(modules)}


@pytest.mark.parametrize("second", ["import megatron_ext.data.a", "def f():\n    from megatron_ext.data import a"])
def test_a_cycle_is_found_also_when_one_half_is_lazy(second: str) -> None:
    assert "import-cycle" in broken_rules("megatron_ext/data/a.py", "from megatron_ext.data.b import x", data__b=second)


def test_a_longer_cycle_is_found_and_a_diamond_is_none() -> None:
    first = "from megatron_ext.data import b, c"
    diamond = {"data__b": "import megatron_ext.data.d", "data__c": "import megatron_ext.data.d", "data__d": "x = 1"}
    assert broken_rules("megatron_ext/data/a.py", first, **diamond) == set()
    assert "import-cycle" in broken_rules(
        "megatron_ext/data/a.py", first, **{**diamond, "data__d": "import megatron_ext.data.a"}
    )


def test_a_violation_names_path_line_and_rule() -> None:
    (violation,) = check([Module("megatron_ext/engine/x.py", "x = 1\ny = 'cuda'")])
    assert str(violation).startswith("megatron_ext/engine/x.py:2 device: ")


def test_tests_are_held_to_size_alone() -> None:
    assert broken_rules("tests/x.py", "import os, deepspeed\nx = os.environ['A']") == set()
    assert broken_rules("tests/x.py", "x = 1\n" * 401) == {"file-length"}
