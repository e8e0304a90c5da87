"""How the kernels of csrc/ become libraries: toolchain, recipe, lock, cache. Imports no torch."""
