"""The kernels measured: what they move, how long it takes, and what others take for the same."""
