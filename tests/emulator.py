"""The CUDA kernels without a GPU: on tensors of the CPU, through tests/c/emulator.

    from emulator import emulated
    out = emulated(arch=90)(q, k, v, scale=0.125, window=(-1, 0))  # differentiable

The engine chooses kernels and tiles as it does for a GPU of that architecture, and fails where a
kernel does what it must not: with a report of where each thread was.
"""

import ctypes
import math
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
ARCHS = [80, 86, 89, 90, 100, 120]  # as in tests/c/emulator/driver.c
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool]  # enum fa_dtype
OK = 0  # enum fa_status

# --- structs, read from the headers that declare them ----------------------------------------

TYPES = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "unsigned long long": ctypes.c_ulonglong,
    "long long": ctypes.c_longlong,
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "enum fa_dtype": ctypes.c_int,
}


def read_structs(header: str) -> None:
    """Adds the structs of a header to TYPES."""
    text = re.sub(r"/\*.*?\*/", "", (ROOT / "csrc" / header).read_text(), flags=re.DOTALL)
    for name, body in re.findall(r"\n(struct \w+) \{\n(.*?)\n\};", text, re.DOTALL):
        fields = []
        for declaration in body.split(";")[:-1]:
            if "(*" in declaration:
                fields.append((re.findall(r"\(\*(\w+)\)", declaration)[0], ctypes.c_void_p))
                continue
            kind, names = re.fullmatch(
                r"\s*(?:const )?((?:struct |enum |unsigned |long )*\w+) (.*)",
                declaration,
                re.DOTALL,
            ).groups()
            for field in names.split(","):
                pointer = "*" in field
                fields.append((field.strip(" *\n"), ctypes.c_void_p if pointer else TYPES[kind]))
        TYPES[name] = type(name.removeprefix("struct "), (ctypes.Structure,), {"_fields_": fields})


read_structs("flash_attention.h")
read_structs("cuda/kernels/params.h")
KernelParams = TYPES["struct fa_kernel_params"]
Params, TensorStruct, MaskStruct, MaskGradStruct = (
    TYPES[f"struct fa_{name}"] for name in ("params", "tensor", "mask", "mask_grad")
)


# --- the library -----------------------------------------------------------------------------


@cache
def library() -> ctypes.CDLL:
    """Builds what is out of date."""
    subprocess.run(["make", "-s", "-C", ROOT / "tests" / "c", "emulator"], check=True)
    lib = ctypes.CDLL(str(ROOT / "tests" / "c" / "build" / "libemulator.so"))
    for name in ("fa_cuda_forward_workspace", "fa_cuda_backward_workspace"):
        getattr(lib, name).restype = ctypes.c_size_t
    lib.fa_cuda_last_error.restype = ctypes.c_char_p
    lib.emu_set_seed.argtypes = [ctypes.c_uint64]
    lib.emu_launch.restype = lib.emu_loaded.restype = ctypes.c_char_p
    return lib


def tensor(x: Tensor | None) -> TensorStruct:
    if x is None:
        return TensorStruct()
    assert x.stride(-1) == 1 or x.shape[-1] == 1, "rows are contiguous"
    return TensorStruct(x.data_ptr(), *x.stride()[:3])


def device_of(arch: int, many_multiprocessors: bool) -> int:
    return 2 * ARCHS.index(arch) + many_multiprocessors


def describe(
    q, k, v, mask, rng_state, scale, window, diagonal_offset, dropout_p, device, allow_tf32
) -> Params:
    p = Params()
    p.dtype = DTYPES.index(q.dtype)
    p.batch, p.heads_q, p.seq_q, p.head_dim = q.shape
    p.heads_k, p.seq_k, p.head_dim_v = *k.shape[1:3], v.shape[3]
    p.q, p.k, p.v = tensor(q), tensor(k), tensor(v)
    p.scale = scale
    p.window_left, p.window_right = window
    p.diagonal_offset = diagonal_offset
    if mask is not None:
        wide = mask.expand(*q.shape[:3], k.shape[2])
        p.mask = MaskStruct(mask.data_ptr(), DTYPES.index(mask.dtype), *wide.stride())
    p.dropout_p = dropout_p
    p.rng_state = rng_state.data_ptr() if dropout_p > 0 else None
    p.device = device
    p.allow_tf32 = allow_tf32
    return p


def run(p: Params, direction: str) -> None:
    """Runs fa_cuda_forward or fa_cuda_backward, with a workspace full of NaN."""
    lib = library()
    p.workspace_bytes = getattr(lib, f"fa_cuda_{direction}_workspace")(ctypes.byref(p))
    workspace = torch.full((p.workspace_bytes + 64,), 255, dtype=torch.uint8)
    p.workspace = (workspace.data_ptr() + 63) // 64 * 64
    if getattr(lib, f"fa_cuda_{direction}")(ctypes.byref(p)) != OK:
        raise RuntimeError(lib.fa_cuda_last_error().decode())


GUARD = 64  # elements


def result(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Full of NaN, with more of it around, for check_surroundings."""
    memory = torch.full((math.prod(shape) + 2 * GUARD,), torch.nan, dtype=dtype)
    return memory[GUARD:-GUARD].view(shape)


def check_surroundings(results: list[Tensor | None]) -> None:
    for x in results:
        if x is not None:
            around = x._base
            assert around[:GUARD].isnan().all() and around[-GUARD:].isnan().all(), "written outside"


class Attention(torch.autograd.Function):
    """struct fa_params filled in as csrc/binding does it."""

    @staticmethod
    def forward(ctx, q, k, v, mask, rng_state, call, deterministic):
        out = result((*q.shape[:3], v.shape[3]), q.dtype)
        lse = result(q.shape[:3], torch.float32)
        p = describe(q, k, v, mask, rng_state, **call)
        p.out, p.lse = tensor(out), lse.data_ptr()
        run(p, "forward")
        check_surroundings([out, lse])
        ctx.save_for_backward(q, k, v, mask, rng_state, out, lse)
        ctx.call, ctx.deterministic = call, deterministic
        return out.clone()

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, mask, rng_state, out, lse = ctx.saved_tensors
        p = describe(q, k, v, mask, rng_state, **ctx.call)
        p.out, p.lse, p.deterministic = tensor(out), lse.data_ptr(), ctx.deterministic
        grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        p.dout = tensor(grad_out)
        dq, dk, dv = (
            result(x.shape, x.dtype) if wanted else None
            for x, wanted in zip((q, k, v), ctx.needs_input_grad)
        )
        p.dq, p.dk, p.dv = tensor(dq), tensor(dk), tensor(dv)
        dmask = None
        if ctx.needs_input_grad[3]:
            scores = (*q.shape[:3], k.shape[2])
            in_dtype = mask.shape == scores and mask.dtype == q.dtype != torch.float32
            dmask = result(mask.shape, q.dtype if in_dtype else torch.float32)
            if not in_dtype:
                dmask.zero_()
            p.dmask = MaskGradStruct(dmask.data_ptr(), *dmask.expand(scores).stride(), in_dtype)
        run(p, "backward")
        check_surroundings([dq, dk, dv, dmask])
        dmask = None if dmask is None else dmask.to(mask.dtype)
        return dq, dk, dv, dmask, None, None, None


def emulated(
    arch: int = 90,
    *,
    many_multiprocessors: bool = False,
    deterministic: bool = False,
    allow_tf32: bool = False,
    seed: int = 0,
) -> Callable[..., Tensor]:
    """Attention by the kernels for an architecture, called as naive.attention is.

    many_multiprocessors: 132 instead of 2, for which the engine takes other tiles. seed: the
    threads of a block run in an order of chance; 0: in turn.
    """

    def attention(
        q, k, v, mask=None, *, scale=1.0, window=(-1, -1), diagonal_offset=0, dropout_p=0.0,
        rng_state=None,
    ):  # fmt: skip
        library().emu_set_seed(seed)
        call = {
            "scale": scale,
            "window": window,
            "diagonal_offset": diagonal_offset,
            "dropout_p": dropout_p,
            "device": device_of(arch, many_multiprocessors),
            "allow_tf32": allow_tf32,
        }
        return Attention.apply(q, k, v, mask, rng_state, call, deterministic)

    return attention


# --- one kernel ------------------------------------------------------------------------------


def launch(
    source: str,
    entry: str,
    *parameters: ctypes._SimpleCData | ctypes.Structure | Tensor,
    grid: int,
    threads: int,
    shared_bytes: int = 0,
    arch: int = 90,
    seed: int = 0,
    **macros: int,
) -> None:
    """Compiles a kernel with these macros and runs it.

    source: CUDA C, or the name of a file in csrc/cuda/kernels. parameters: the kernel's, as the
    structs of TYPES or as bytes (tensor_maps).
    """
    lib = library()
    lib.emu_set_seed(seed)
    if source.endswith(".cu"):
        source = (ROOT / "csrc" / "cuda" / "kernels" / source).read_text()
    options = [f"--gpu-architecture=sm_{arch}", f"-DTHREADS={threads}"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    addresses = [x.data_ptr() if isinstance(x, Tensor) else ctypes.addressof(x) for x in parameters]
    problem = lib.emu_launch(
        source.encode(),
        entry.encode(),
        len(options),
        (ctypes.c_char_p * len(options))(*(option.encode() for option in options)),
        grid,
        threads,
        shared_bytes,
        (ctypes.c_void_p * len(addresses))(*addresses),
    )
    if problem:
        raise RuntimeError(problem.decode())


def tensor_maps(*boxes: tuple[Tensor, int, int]) -> Tensor:
    """A struct of tensor maps, one for each ([B, H, S, D], columns, rows) of a box.

    As encode_tensor of csrc/cuda/engine/forward_sm90.c makes them.
    """
    types = {torch.uint8: 0, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
    memory = torch.empty(128 * len(boxes) + 64, dtype=torch.uint8)
    maps = memory[-memory.data_ptr() % 64 :][: 128 * len(boxes)]
    for n, (x, columns, rows) in enumerate(boxes):
        strides = (x.element_size() * stride for stride in reversed(x.stride()[:3]))
        error = library().cuTensorMapEncodeTiled(
            ctypes.c_void_p(maps.data_ptr() + 128 * n),
            types[x.dtype],
            4,
            ctypes.c_void_p(x.data_ptr()),
            (ctypes.c_uint64 * 4)(*reversed(x.shape)),
            (ctypes.c_uint64 * 3)(*strides),
            (ctypes.c_uint32 * 4)(columns, rows, 1, 1),
            (ctypes.c_uint32 * 4)(1, 1, 1, 1),
            *(0, 3, 3, 0),
        )
        assert not error, f"map {n} cannot be encoded"
    return maps
