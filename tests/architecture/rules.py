"""Rules for one module each: they yield violations, which print as ``path:line rule: message``."""

import ast
from collections.abc import Callable, Iterator

from tests.architecture.source import PACKAGE, Module, Violation, inside
from tests.architecture.table import (
    CUDA_LITERALS_IN,
    DOORS,
    IMPORTS_TORCH,
    LAYERS,
    LIBRARIES,
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    MAX_PARAMETERS,
    NO_ITEM_IN,
    TORCH_FREE,
)

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def layers(module: Module) -> Iterator[Violation]:
    """Imports inside the package point to smaller layers."""
    if module.inner == "__init__":
        return
    own = LAYERS.get(module.part)
    if own is None:
        yield Violation(module.path, 1, "layers", f"{module.part} is not in the layer table")
        return
    for item in module.imports:
        if not inside(item.name, PACKAGE):
            continue
        other = item.name.removeprefix(PACKAGE).removeprefix(".").split(".")[0]
        if other in ("", module.part) or other == "__version__":
            continue
        if LAYERS.get(other, 99) >= own:
            message = f"{module.part} (layer {own}) imports {item.name} (layer {LAYERS.get(other, 'unknown')})"
            yield Violation(module.path, item.line, "layers", message)


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return None


def _imported_names(tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted name of what it was imported as: ``import a.b``, ``import a as b``, ``from a import b``."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def _door_of(name: str) -> str | None:
    fitting = [door for door in DOORS if inside(name, door)]
    return max(fitting, key=len) if fitting else None


def doors(module: Module) -> Iterator[Violation]:
    """Names behind a door are imported and used only by the part that owns the door."""
    uses = [(item.name, item.line) for item in module.imports]
    imported = _imported_names(module.tree)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node)):
            first, _, rest = name.partition(".")
            if first in imported:
                uses.append((f"{imported[first]}.{rest}", node.lineno))
    seen: set[tuple[str, int]] = set()
    for name, line in uses:
        door = _door_of(name)
        if door is not None and module.part not in DOORS[door] and (door, line) not in seen:
            seen.add((door, line))
            owners = ", ".join(sorted(DOORS[door]))
            yield Violation(module.path, line, "doors", f"{door} is used by {module.part}; only in {owners}")


def torch_free(module: Module) -> Iterator[Violation]:
    """config and curriculum do not import torch, nor what imports it, anywhere."""
    if module.part not in TORCH_FREE:
        return
    for item in module.imports:
        if item.name.split(".")[0] in IMPORTS_TORCH and not item.typing_only:
            yield Violation(module.path, item.line, "torch-free", f"{module.part} imports {item.name}")


def relative_imports(module: Module) -> Iterator[Violation]:
    """Imports are absolute."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield module.violation(node, "relative-import", "write the absolute name")


def package_init(module: Module) -> Iterator[Violation]:
    """An ``__init__.py`` holds a docstring, and in the package itself the version: importing a part stays cheap.

    A part that is a library may re-export names: imports of the package's own, and their list ``__all__``.
    """
    if not module.path.endswith("/__init__.py"):
        return
    for node in module.tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assigned = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        version = module.inner == "__init__" and assigned == "__version__"
        reexport = assigned == "__all__" or (isinstance(node, ast.ImportFrom) and inside(node.module or "", PACKAGE))
        if not (docstring or version or (reexport and module.part in LIBRARIES)):
            yield module.violation(node, "package-init", "an __init__.py holds its docstring only")


def sizes(module: Module) -> Iterator[Violation]:
    """Files, functions and parameter lists stay small."""
    lines = len(module.source.splitlines())
    if lines > MAX_FILE_LINES:
        yield Violation(module.path, MAX_FILE_LINES + 1, "file-length", f"{lines} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(module.tree):
        if not isinstance(node, FunctionNode):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            message = f"{node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
            yield module.violation(node, "function-length", message)
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > MAX_PARAMETERS and not _is_command(module, node):
            yield module.violation(node, "parameters", f"{node.name} takes {count}, at most {MAX_PARAMETERS}")


def _is_command(module: Module, node: FunctionNode) -> bool:
    decorators = {ast.unparse(item).split("(", maxsplit=1)[0].rpartition(".")[2] for item in node.decorator_list}
    return module.part == "cli" and (node.name == "command" or "command" in decorators)


def shared_state(module: Module) -> Iterator[Violation]:
    """No ``global`` and no ``get_args()`` of Megatron: what a function needs is passed to it."""
    from_typing = any(item.name == "typing.get_args" for item in module.imports)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global):
            yield module.violation(node, "global", f"global {', '.join(node.names)}; pass the value")
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func) or ""
        if (name == "get_args" and not from_typing) or (name.endswith(".get_args") and name != "typing.get_args"):
            yield module.violation(node, "get-args", f"{name}() reads a shared configuration; pass the section")


def no_utils(module: Module) -> Iterator[Violation]:
    """A module is named after what it holds."""
    if module.inner.split(".")[-1] in {"utils", "util"}:
        yield Violation(module.path, 1, "module-name", "name the module after what it holds")


def device_neutral(module: Module) -> Iterator[Violation]:
    """Where tensors live is decided in runtime; kernels may ask."""
    if module.part in CUDA_LITERALS_IN:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield module.violation(node, "device", ".cuda(); take the device from runtime")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_cuda_device(node.value):
            yield module.violation(node, "device", f"{node.value!r}; take the device from runtime")


def _is_cuda_device(text: str) -> bool:
    return text == "cuda" or (text.startswith("cuda:") and " " not in text)


def no_synchronization(module: Module) -> Iterator[Violation]:
    """The step never waits for the device: losses are fetched together, later."""
    if module.inner not in NO_ITEM_IN:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "item":
            yield module.violation(node, "item", ".item() waits for the device inside the step")


PACKAGE_RULES: tuple[Callable[[Module], Iterator[Violation]], ...] = (
    layers,
    doors,
    torch_free,
    relative_imports,
    package_init,
    sizes,
    shared_state,
    no_utils,
    device_neutral,
    no_synchronization,
)
# Tests, launch scripts and benchmarks: not layered, but readable all the same.
OUTSIDE_RULES: tuple[Callable[[Module], Iterator[Violation]], ...] = (relative_imports, sizes)
