"""Planted faults: each is put into a copy of the kernels, and the kernels' own tests must notice it.

``python -m tests.kernels.mutation`` (`make test-mutation`) prints what noticed each, and exits with 1 if one survives.
"""
