"""One planted fault: a text of a source, and what stands in its place."""

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """``file`` is below csrc; ``old`` is in it once. ``ops`` have the tests (tests/kernels/test_OP.py) to notice it."""

    name: str
    file: str
    old: str
    new: str
    ops: tuple[str, ...]

    @property
    def on_cpu(self) -> bool:
        """Whether it is in a kernel for the CPU."""
        return self.file.startswith("cpu/")

    def occurrences(self, root: Path) -> int:
        """How often the text is in the sources: anything but 1 is a fault of this list."""
        return (root / self.file).read_text(encoding="utf-8").count(self.old)

    def plant(self, root: Path, target: Path) -> None:
        """Copies the sources of the ops to ``target``, with the fault; other kernels are left out, to build less."""
        shutil.copytree(root, target)
        path = target / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.name}: not once in {self.file}"
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        if not self.on_cpu:
            kept = {f"{source}.cu" for op in self.ops for source in (op, *NEEDED.get(op, ()))} | {"column_sums.cu"}
            for source in (target / "cuda").glob("*.cu"):
                if source.name not in kept:
                    source.unlink()


# Sources whose functions the tests of an op call beside its own.
NEEDED: dict[str, tuple[str, ...]] = {"add_layer_norm": ("layer_norm",)}
