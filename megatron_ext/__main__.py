"""``python -m megatron_ext`` is the command line."""

from megatron_ext.cli.app import main

if __name__ == "__main__":
    main()
