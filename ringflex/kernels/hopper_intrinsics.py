"""What Gluon 3.6 lacks on Hopper, by means that are tied to Triton's version.

Named barriers and packed conversions are inline assembly; what adds a tile of shared memory to
global memory by TMA, or sees it in another layout, calls the IR builder. `obstacle()` says where
these are not known to work.
"""

from __future__ import annotations

import triton
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma

VERSIONS = ("3.6",)

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


def obstacle() -> str | None:
    """Why the Hopper kernels do not run with this Triton; None if they do."""
    installed = triton.__version__
    if any(installed == v or installed.startswith(f"{v}.") for v in VERSIONS):
        return None
    return f"the Hopper kernels know Triton {', '.join(VERSIONS)}, not {installed}"


@gluon.jit
def _named_barrier(WHAT: gl.constexpr, barrier, THREADS: gl.constexpr):
    return gl.inline_asm_elementwise(
        "bar." + WHAT + " $1, " + THREADS + "; mov.u32 $0, 0;",
        "=r,r",
        [barrier],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def come(barrier, THREADS: gl.constexpr):
    """Comes to a named barrier, by its number, and goes on: warp by warp, where `mbarrier.arrive`
    has a warpgroup's warps wait for one another."""
    return _named_barrier("arrive", barrier, THREADS)


@gluon.jit
def wait_for(barrier, THREADS: gl.constexpr):
    """Waits at a named barrier, by its number, until `THREADS` have come, these among them."""
    return _named_barrier("sync", barrier, THREADS)


@gluon.jit
def hold_until(x):
    """What follows and waits, waits only when `x` is computed: the assembler would move the wait
    ahead of what does not depend on it.

    x: fp32, two numbers to a thread. It holds the order of barriers; so there is one behind `x`,
    under a condition that no number meets, as no arithmetic makes a NaN of this kind.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred never;
        .reg .b32 both;
        or.b32 both, $2, $3;
        setp.eq.u32 never, both, 0xffc12345;
        @never bar.arrive 15, 32;
        mov.u32 $0, 0;
        mov.u32 $1, 0;
        }""",
        "=r,=r,r,r",
        [x],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def uniform(value):
    """A number that all threads have alike, in a form that the assembler keeps once per warp."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;",
        "=r,r",
        [value],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def packed(x, dtype: gl.constexpr):
    """fp32 `[M, N]` as pairs of a half precision in int32 `[M, N / 2]`.

    A loop that carried halves would take each pair apart and put it together again.
    """
    even, odd = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    PAIR: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise(
        "cvt.rn." + PAIR + ".f32 $0, $2, $1;", "=r,f,f", [even, odd], gl.int32, True, 1
    )


@gluon.jit
def unpacked(x, dtype: gl.constexpr, layout: gl.constexpr):
    """Those halves, `[M, N]`, in the layout of the left operand of a product."""
    even, odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [x], (gl.int16, gl.int16), True, 1
    )
    halves = gl.join(even.to(dtype, bitcast=True), odd.to(dtype, bitcast=True))
    return gl.convert_layout(gl.reshape(halves, [x.shape[0], 2 * x.shape[1]]), layout)


@_core.builtin
def shared_as(src, dtype, shape, layout, _semantic=None):
    """Shared memory, seen in another dtype, shape and layout."""
    plain = _core._unwrap_if_constexpr
    shape = [plain(n) for n in plain(shape)]
    return _semantic.memdesc_reinterpret(src, plain(dtype), shape, plain(layout))


@_core.builtin
def tma_add(tensor_desc, coord, src, _semantic=None):
    """Adds a tile of shared memory to where a descriptor says, asynchronously."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)
