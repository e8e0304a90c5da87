"""Bytes are those of the tensors that an operation takes and gives, counted one by one."""

import sys
import types

import pytest
import torch

from megatron_ext.ops.bench.figures import OPERATIONS, Case, Measured, cases, figures, table, traffic
from megatron_ext.ops.bench.measure import Effort, implementations, measure
from tests.engine.training import CPU


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


X, ROW, STATISTIC = torch.empty(6, 16), torch.empty(16), torch.empty(6)


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        ("layer_norm", [X, X, ROW, ROW, STATISTIC, STATISTIC], [X, X, X, ROW, ROW, ROW, STATISTIC, STATISTIC]),
        (
            "add_layer_norm",
            [X, X, X, X, ROW, ROW, ROW, STATISTIC, STATISTIC],
            [X, X, X, X, X, ROW, ROW, ROW, ROW, STATISTIC, STATISTIC],
        ),
        ("bias_gelu", [X, X, ROW], [X, X, X, ROW, ROW]),
        ("bias_dropout_add", [X, X, X, ROW], [X, X, ROW]),
        ("adam_variance", [X], []),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_parameters_and_statistics(
    op: str, forward: list[torch.Tensor], backward: list[torch.Tensor], dtype: str
) -> None:
    def counted(tensors: list[torch.Tensor]) -> int:
        wide = [tensor for tensor in tensors if tensor is STATISTIC]
        return size(*(t.to(getattr(torch, dtype)) for t in tensors if t is not STATISTIC), *wide)

    moved = traffic(Case(op, (6, 16), dtype))
    assert (moved.forward, moved.backward) == (counted(forward), counted(backward))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (3, 7)])
def test_a_causal_softmax_reads_what_is_seen_and_writes_all(queries: int, keys: int) -> None:
    seen = int(torch.ones(queries, keys).tril(keys - queries).sum()) * 4 * 2 * 3
    everything = queries * keys * 4 * 2 * 3
    moved = traffic(Case("causal_softmax", (2, 3, queries, keys), "float32"))
    assert (moved.forward, moved.backward) == (seen + everything, 2 * seen + everything)


def test_labels_count() -> None:
    labels, three = torch.empty(6, dtype=torch.int64), torch.empty(3, 6)
    assert traffic(Case("cross_entropy", (6, 16), "float32")).forward == size(X, labels, three)
    assert traffic(Case("cross_entropy", (6, 16), "bfloat16")).backward == 2 * size(X.bfloat16()) + size(labels, three)


@pytest.mark.parametrize("sizes", ["gpt2", "large", "small"])
def test_there_is_a_case_for_every_operation(sizes: str) -> None:
    assert tuple(case.op for case in cases(sizes, "bfloat16")) == OPERATIONS


def test_figures_follow_from_times() -> None:
    case = Case("bias_gelu", (1000, 1000), "float32")
    measured = Measured(case, {"fused": 1e-3, "torch": 3e-3}, {"fused": 3e-3, "torch": 4.5e-3}, {})
    forward, backward = figures(measured, copy_bytes_per_second=16e9)
    assert forward.microseconds == pytest.approx(1000)
    assert forward.gigabytes_per_second == pytest.approx(8.004)
    assert forward.share_of_copy == pytest.approx(0.50025)
    assert forward.ratios == {"torch": pytest.approx(3.0)}
    assert backward.microseconds == pytest.approx(2000)
    assert backward.gigabytes_per_second == pytest.approx(12.008 / 2)
    assert backward.ratios == {"torch": pytest.approx(1.5)}
    lines = table([forward, backward]).splitlines()
    assert len({line.index("torch") if "torch" in line else line.index("x", 60) for line in lines[1:]}) == 1
    assert lines[1].split()[-4:] == ["1000.0", "8.0", "50%", "3.00x"]


def test_a_backward_too_fast_to_tell_has_no_rate() -> None:
    case = Case("bias_gelu", (4, 4), "float32")
    backward = figures(Measured(case, {"fused": 2e-3}, {"fused": 1e-3}, {}), copy_bytes_per_second=1e9)[1]
    assert backward.gigabytes_per_second != backward.gigabytes_per_second


@pytest.mark.usefixtures("fused")
def test_a_library_that_is_installed_takes_part_and_one_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand:
        @staticmethod
        def apply(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, eps: float) -> torch.Tensor:
            return torch.nn.functional.layer_norm(x, (x.shape[-1],), w, b, eps)

    def refuses(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("no GPU\nhere")

    stands: dict[str, dict[str, object]] = {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": Stand},
        "apex": {},
        "apex.normalization": {},
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": refuses},
    }
    for name, content in stands.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    assert set(implementations("layer_norm", compiled=False)) == {"fused", "torch", "apex", "liger"}
    effort = Effort(rounds=1, seconds=0.0, cold_bytes=1, compiled=False)
    measured = measure(Case("layer_norm", (4, 8), "float32"), CPU, effort)
    assert set(measured.forward) == set(measured.both) == {"fused", "torch", "liger"}
    assert measured.failures == {"apex": "RuntimeError: no GPU"}
