"""Each op once in both directions on inputs of a given width, for tests of what holds for all of them."""

from collections.abc import Callable

import torch

from tests.kernels import calls
from tests.kernels.accuracy import normal
from tests.kernels.backends import KernelBackend

Results = dict[str, torch.Tensor]
NOISE = calls.Noise(probability=0.2, seed=11)
PARTITIONS = 3


def _layer_norm(backend: KernelBackend, cols: int) -> Results:
    x, dy = normal((50, cols), torch.float16, seed=1), normal((50, cols), torch.float16, seed=2)
    weight, bias = normal((cols,), torch.float32, seed=3), normal((cols,), torch.float32, seed=4)
    forward = calls.layer_norm_forward(backend, x, weight, bias)
    mean, rstd = forward["mean"].cpu(), forward["rstd"].cpu()
    return forward | calls.layer_norm_backward(backend, dy, x, weight, statistics=(mean, rstd), partitions=PARTITIONS)


def _add_layer_norm(backend: KernelBackend, cols: int) -> Results:
    x, residual, dy, dsum = (normal((50, cols), torch.bfloat16, seed=seed) for seed in range(4))
    weight, bias = normal((cols,), torch.bfloat16, seed=5), normal((cols,), torch.bfloat16, seed=6)
    forward = calls.add_layer_norm_forward(backend, x, bias, residual, (weight, bias), noise=NOISE)
    statistics = forward["mean"].cpu(), forward["rstd"].cpu()
    return forward | calls.add_layer_norm_backward(
        backend, (dy, dsum), (forward["sum"].cpu(), *statistics), weight,
        with_x_bias=True, partitions=PARTITIONS, noise=NOISE,
    )  # fmt: skip


def _causal_softmax(backend: KernelBackend, cols: int) -> Results:
    scores, dy = normal((2, 9, cols), torch.float32, seed=1), normal((2, 9, cols), torch.float32, seed=2)
    forward = calls.causal_softmax_forward(backend, scores, 0.5, noise=NOISE)
    return forward | calls.causal_softmax_backward(backend, dy, forward["probs"].cpu(), 0.5, noise=NOISE)


def _bias_gelu(backend: KernelBackend, cols: int) -> Results:
    x, dy, bias = (normal(shape, torch.float16, seed=1) for shape in ((150, cols), (150, cols), (cols,)))
    forward = calls.bias_gelu_forward(backend, x, bias, exact=False)
    return forward | calls.bias_gelu_backward(backend, dy, x, bias, exact=True, partitions=PARTITIONS)


def _bias_dropout_add(backend: KernelBackend, cols: int) -> Results:
    x, residual, bias = (normal(shape, torch.float16, seed=1) for shape in ((150, cols), (150, cols), (cols,)))
    forward = calls.bias_dropout_add_forward(backend, x, bias, residual, noise=NOISE)
    return forward | calls.bias_dropout_add_backward(backend, x, x.dtype, partitions=PARTITIONS, noise=NOISE)


def _cross_entropy(backend: KernelBackend, cols: int) -> Results:
    logits, labels, grad = normal((5, cols), torch.bfloat16, seed=1), torch.arange(5), torch.ones(5)
    forward = calls.cross_entropy_forward(backend, logits, labels, first=2, real=cols - 1)
    statistics = forward["maximum"].cpu(), forward["total"].cpu(), grad
    return forward | calls.cross_entropy_backward(backend, logits, labels, statistics, first=2, real=cols - 1)


def _adam_variance(backend: KernelBackend, cols: int) -> Results:
    return calls.adam_variance(backend, normal((9 * cols,), torch.float32, seed=1).abs(), partitions=PARTITIONS)


OPS: list[Callable[[KernelBackend, int], Results]] = [
    _layer_norm,
    _add_layer_norm,
    _causal_softmax,
    _bias_gelu,
    _bias_dropout_add,
    _cross_entropy,
    _adam_variance,
]
