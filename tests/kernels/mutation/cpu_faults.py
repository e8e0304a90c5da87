"""The faults of the kernels for the CPU."""

from tests.kernels.mutation.fault import Fault

CPU_FAULTS = (
    Fault(
        "probabilities beyond the diagonal",
        "cpu/softmax.h",
        "    store(probs + c, keep(e * inverse, Floats{}, lanes), lanes);\n  });\n  clear_rest(probs, of);\n",
        "    store(probs + c, keep(e * inverse, Floats{}, lanes), lanes);\n  });\n",
        ("softmax",),
    ),
    Fault(
        "lanes beyond the row count",
        "cpu/layer_norm.h",
        "keep(load(x + c, lanes) - center, Floats{}, lanes)",
        "load(x + c, lanes) - center",
        ("layer_norm",),
    ),
    Fault(
        "a new maximum without its rescaling",
        "cpu/cross_entropy.cpp",
        "    if (higher > row.maximum) row.total *= exp_to_zero(broadcast(row.maximum - shift))[0];\n",
        "",
        ("cross_entropy",),
    ),
    Fault(
        "four blocks of noise twice",
        "cpu/noise.h",
        "high = counters(block + 4)",
        "high = counters(block)",
        ("bias_dropout_add",),
    ),
    Fault(
        "a group's last row left out",
        "cpu/column_sums.h",
        "work(first_row(p), first_row(p + 1), sums)",
        "work(first_row(p), first_row(p + 1) - 1, sums)",
        ("bias_dropout_add",),
    ),
    Fault(
        "bias outside of the dropout",
        "cpu/bias_dropout_add.cpp",
        "load(residual + c, lanes) + value(c, lanes) * factor",
        "load(residual + c, lanes) + value(c, lanes)",
        ("bias_dropout_add",),
    ),
)
