"""``python -m tests.kernels.static``: rewrites the table of registers and wide accesses."""

from tests.kernels.static.device_code import rewrite_table

if __name__ == "__main__":
    rewrite_table()
