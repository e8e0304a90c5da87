"""One source file as the architecture rules see it: names, imports, and what a violation looks like."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

PACKAGE = "megatron_ext"


@dataclass(frozen=True)
class Violation:
    """One broken rule at one place."""

    path: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.rule}: {self.message}"


@dataclass(frozen=True)
class Import:
    """One imported dotted name; ``from a import b`` is ``a.b``."""

    name: str
    line: int
    lazy: bool
    """Inside a function: not executed when the module is imported."""
    typing_only: bool
    """Under ``if TYPE_CHECKING``."""


@dataclass(frozen=True)
class Module:
    """One source file; ``path`` is relative to the repository root."""

    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.source, filename=self.path)

    @cached_property
    def name(self) -> str:
        """Dotted name, ``megatron_ext.config`` for ``megatron_ext/config/__init__.py``."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def in_package(self) -> bool:
        """Whether the file belongs to the package (and not to the tests or the launch scripts)."""
        return self.path.startswith(f"{PACKAGE}/")

    @property
    def inner(self) -> str:
        """Dotted name inside the package, ``__init__`` for the package itself."""
        return self.name.removeprefix(PACKAGE).removeprefix(".") or "__init__"

    @property
    def part(self) -> str:
        """First component inside the package: the row of the layer table."""
        return self.inner.split(".", maxsplit=1)[0]

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """Every import of the file, those inside functions too."""
        return tuple(_imports(self.tree, lazy=False, typing_only=False))

    def violation(self, node: ast.AST, rule: str, message: str) -> Violation:
        """A violation at ``node``."""
        return Violation(self.path, getattr(node, "lineno", 1), rule, message)


def _imports(node: ast.AST, *, lazy: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy, typing_only) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            yield from (Import(f"{child.module}.{a.name}", child.lineno, lazy, typing_only) for a in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _imports(ast.Module([statement], []), lazy=lazy, typing_only=True)
            for statement in child.orelse:
                yield from _imports(ast.Module([statement], []), lazy=lazy, typing_only=typing_only)
        else:
            deferred = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, lazy=deferred, typing_only=typing_only)


def inside(name: str, prefix: str) -> bool:
    """Whether a dotted name is ``prefix`` or below it."""
    return name == prefix or name.startswith(f"{prefix}.")
