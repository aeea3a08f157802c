"""What kernels are compiled to: the same code in every process, whatever that process has compiled before."""

import pytest
from numba import cfunc, types

from steadynorm.ops.cpu import column_kernels, plane_kernels
from steadynorm.ops.cpu.call import SMOOTH, Kinds, record
from steadynorm.ops.cpu.compiling import FAST
from support_processes import finished, start

KERNELS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)
    for module in (plane_kernels, column_kernels)
    for name in ("forward", "backward")
}
COUNTING = {"NRT_incref", "NRT_decref"}  # Numba's own, of references to what is allocated


@pytest.mark.parametrize(
    ("name", "kinds"),
    [*((name, Kinds("float32")) for name in KERNELS), ("plane_kernels.forward", Kinds("float32", activation=SMOOTH))],
    ids=[*KERNELS, "plane_kernels.forward, smooth"],
)
def test_a_kernel_is_one_function(name, kinds):
    """A part that stayed a function of its own would be shared by all kernels of a process.

    It would be the code of whichever was compiled or loaded first, and the last bits of results would depend on that.
    """
    built = cfunc(types.void(types.CPointer(record(kinds))), **FAST)(KERNELS[name].function)
    defined = [f.name for f in built._library._final_module.functions if not f.is_declaration]
    own = set(defined) - COUNTING
    wrapper = built.native_name
    assert wrapper in own
    (itself,) = own - {wrapper}
    assert KERNELS[name].function.__name__ in itself


def test_another_kernel_compiled_before_changes_no_bit(tmp_path):
    """One process has compiled others first, the next one loads all it needs: as in a program run again."""
    code = """
    import hashlib
    from steadynorm.ops.cpu import column_kernels, plane_kernels
    from steadynorm.ops.cpu.call import BENT, RELU, Kinds

    compiled = cache_hits()
    if {first}:
        plane_kernels.forward.compile(Kinds("float32", activation=BENT))
    else:
        column_kernels.backward.compile(Kinds("float32", activation=RELU))
    found = [t for t in run(step((30, 7))) if t is not None]
    bits = b"".join(t.contiguous().numpy().tobytes() for t in found)
    print(hashlib.sha256(bits).hexdigest(), len(bits), compiled)
    """
    first, second = (
        finished(start(code.format(first=first), NUMBA_CACHE_DIR=str(tmp_path))).split(maxsplit=2)
        for first in (True, False)
    )
    assert first[2].split() == ["[0,", "0,", "0]"]
    assert second[2].split() == ["[1,", "1]"]
    assert first[:2] == second[:2]
