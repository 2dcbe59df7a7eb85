from typing import TypedDict

from torch import Tensor

def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    /,
) -> Tensor | None: ...

class BuildInfo(TypedDict):
    version: str
    torch: str
    compiler: str
    flags: str

def isa() -> str: ...
def isa_list() -> list[tuple[str, bool]]: ...
def set_isa(name: str) -> None: ...
def build_info() -> BuildInfo: ...

class CudaCall(TypedDict):
    """What decides how the CUDA kernels of a call are compiled; dtypes as in "float16"."""

    dtype: str
    head_dim: int
    head_dim_v: int
    aligned: bool  # all rows of q, k, v and of what has their shape start at multiples of 16 bytes
    seq_q: int  # how many queries: there are kernels for many and for few
    mask: str | None  # its dtype
    window: bool  # causal too
    dropout: bool
    backward: bool
    mask_grad: bool
    mask_broadcasts: bool  # of interest where mask_grad
    deterministic: bool  # of interest where backward
    allow_tf32: bool

class CudaKernel(TypedDict):
    file: str  # in csrc/cuda/kernels
    block_m: int
    block_n: int
    threads: int
    shared_bytes: int
    cubin: bytes
    log: str

class CudaInfo(TypedDict):
    devices: list[tuple[str, int]]  # name and architecture: 90 for compute capability 9.0
    driver: int  # 13000: CUDA 13.0; 0: there is none
    nvrtc: tuple[int, int]  # (0, 0): there is none
    nvrtc_path: str | None
    cache: str

def cuda_info() -> CudaInfo: ...
def cuda_set_nvrtc(path: str) -> None: ...
def cuda_last_error() -> str: ...
def cuda_unsupported(call: CudaCall, device: int) -> str | None: ...
def cuda_choice(call: CudaCall, arch: int) -> list[tuple[str, str | None]]: ...
def cuda_compile(call: CudaCall, arch: int) -> list[CudaKernel]: ...
