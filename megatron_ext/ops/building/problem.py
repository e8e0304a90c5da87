"""The one way in which kernels cannot be had."""

from megatron_ext.errors import UserError


class KernelsUnavailableError(UserError):
    """Kernels cannot be built or loaded here: what is missing, and one line on what to do."""
