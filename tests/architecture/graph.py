"""Rules for all modules together: cycles, and what is imported through others."""

from collections.abc import Iterator, Mapping, Sequence

from tests.architecture.rules import OUTSIDE_RULES, PACKAGE_RULES
from tests.architecture.source import Module, Violation, inside
from tests.architecture.table import IMPORTS_TORCH, TORCH_FREE_AT_IMPORT


def _edges(modules: Sequence[Module], *, keep_lazy: bool) -> dict[str, dict[str, int]]:
    """Module -> imported module of the tree -> line. Importing a.b.c also runs a and a.b."""
    known = {module.name for module in modules}
    edges: dict[str, dict[str, int]] = {module.name: {} for module in modules}
    for module in modules:
        for item in module.imports:
            if item.typing_only or (item.lazy and not keep_lazy):
                continue
            pieces = item.name.split(".")
            for size in range(1, len(pieces) + 1):
                target = ".".join(pieces[:size])
                if target in known and target != module.name and not inside(module.name, target):
                    edges[module.name].setdefault(target, item.line)
    return edges


def import_cycles(modules: Sequence[Module]) -> Iterator[Violation]:
    """No module reaches itself through imports; one inside a function only hides the cycle and counts."""
    edges = _edges(modules, keep_lazy=True)
    paths = {module.name: module.path for module in modules}
    done: set[str] = set()

    def visit(name: str, stack: list[str]) -> Iterator[Violation]:
        for target, line in edges[name].items():
            if target in stack:
                cycle = " -> ".join([*stack[stack.index(target) :], target])
                yield Violation(paths[name], line, "import-cycle", cycle)
            elif target not in done:
                yield from visit(target, [*stack, target])
        done.add(name)

    for module in modules:
        if module.name not in done:
            yield from visit(module.name, [module.name])


def torch_at_import(modules: Sequence[Module]) -> Iterator[Violation]:
    """Importing a torch-free module imports torch through no chain of modules either."""
    by_name = {module.name: module for module in modules}
    edges = _edges(modules, keep_lazy=False)
    for module in modules:
        if not any(inside(module.inner, free) for free in TORCH_FREE_AT_IMPORT):
            continue
        came_from: dict[str, str | None] = {module.name: None}
        queue = [module.name]
        while queue:
            name = queue.pop()
            for item in by_name[name].imports:
                if item.name.split(".")[0] in IMPORTS_TORCH and not (item.lazy or item.typing_only):
                    chain = _chain(name, came_from)
                    yield Violation(module.path, 1, "torch-at-import", f"{' -> '.join(chain)} -> {item.name}")
            for target in edges[name]:
                if target not in came_from:
                    came_from[target] = name
                    queue.append(target)


def _chain(name: str, came_from: Mapping[str, str | None]) -> list[str]:
    chain = []
    step: str | None = name
    while step is not None:
        chain.append(step)
        step = came_from[step]
    return chain[::-1]


def check(modules: Sequence[Module]) -> list[Violation]:
    """Every violation of every rule, in the order of the files."""
    package = [module for module in modules if module.in_package]
    found: list[Violation] = []
    for module in modules:
        for rule in PACKAGE_RULES if module.in_package else OUTSIDE_RULES:
            found.extend(rule(module))
    found.extend(import_cycles(package))
    found.extend(torch_at_import(package))
    return sorted(found, key=lambda violation: (violation.path, violation.line, violation.rule))
