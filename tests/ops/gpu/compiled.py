"""Compiles every kernel for a GPU, which needs none: what `test_kernels` runs in a process without the interpreter."""

import itertools
import sys

import triton
from triton.backends.compiler import GPUTarget

from steadynorm.activations import NAMES
from steadynorm.ops.gpu import committing, resident, split

TARGET = GPUTarget("cuda", 90, 32)
INT64 = {"P", "S"}


def compile_for(kernel, options: dict[str, object], dtype: str, absent: frozenset[str]) -> None:
    types, constants = {}, {}
    for name in kernel.arg_names:
        if name in options:
            types[name], constants[name] = "constexpr", options[name]
        elif name in absent:
            types[name], constants[name] = "constexpr", None
        elif name in ("table_ptr", "partial_ptr", "sums_ptr", "moments_ptr"):
            types[name] = "*fp64"
        elif name == "valid_ptr":
            types[name] = "*u8"
        elif name in ("tracked_ptr", "rejected_ptr"):
            types[name] = "*i64"
        elif name == "refused_ptr":
            types[name] = "*i32"
        elif name.endswith("_ptr"):
            types[name] = f"*{dtype}"
        else:
            types[name] = "fp32" if name == "eps" else "i64" if name in INT64 else "i32"
    triton.compile(triton.compiler.ASTSource(kernel, types, constants), target=TARGET)


def main() -> None:
    optional = frozenset({"residual_ptr", "gamma_ptr", "beta_ptr", "weight_ptr", "valid_ptr", "moments_ptr"})
    optional |= {"grad_residual_ptr"}
    names = NAMES if "all" in sys.argv else ("", "gelu")
    tiled = (split.measure, split.normalize, split.reduce, split.gradient, resident.forward, resident.backward)
    cases = [
        (names[0], "fp32", True, frozenset()),
        (names[-1], "bf16", False, optional),
        ("silu", "fp64", True, optional),
    ]
    cases += [(name, "fp32", False, optional) for name in names]
    for kernel, (name, dtype, columns, absent) in itertools.product(tiled, cases):
        wide = triton.language.float64 if dtype == "fp64" else triton.language.float32
        block = {"COLUMNS": columns, "BLOCK_P": 64, "BLOCK_C": 16 if columns else 1, "WIDE": wide}
        options = {"NAME": name, "a": 1.0, "b": 20.0, **block}
        compile_for(kernel, {k: v for k, v in options.items() if k in kernel.arg_names}, dtype, absent)
    for kernel in (split.gather_statistics, split.gather_gradients):
        compile_for(kernel, {"BLOCK_C": 128}, "fp64", frozenset())
    for momentum, weighted in ((0.1, False), (None, True)):
        options = {"momentum": momentum, "WEIGHTED": weighted, "BLOCK": 1024}
        compile_for(committing._commit, options, "fp32", frozenset())
    print("compiled")


main()
