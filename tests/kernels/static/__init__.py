"""What can be said of the kernels' device code without running it.

``python -m tests.kernels.static`` rewrites ``table.json``: the number of registers that each kernel may have, in the
units that a device gives them out in, and which kernels access memory 16 bytes at a time.
"""
