"""How the kernels of csrc/ become libraries: toolchain, recipe, cache. Imports no torch."""
