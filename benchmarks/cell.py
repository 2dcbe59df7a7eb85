"""A cell of a table: one call of attention, its inputs, its peers, its check, its FLOPs.

A cell is a dict, as it will stand in the result file: dtype, batch, heads, heads_k, length,
head_dim, causal, dropout_p and bias, which is None, "given" or "with gradient"; where they differ,
length_k and head_dim_v, of keys and of values.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import flash_attn_ext

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-2}  # of the largest value
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def title(cell: dict) -> str:
    mask = "causal" if cell["causal"] else "full"
    heads = f"{cell['batch']}x{cell['heads']}:{cell['heads_k']}"
    sizes = f"{heads:8} d={dims(cell):7} {mask:6} N={lengths(cell):11}"
    return f"{cell['feature']:8} {cell['dtype']:8} {sizes}"


def dims(cell: dict) -> str:
    """Head size, and that of V where it has its own."""
    return "/".join(str(cell[name]) for name in ("head_dim", "head_dim_v") if name in cell)


def lengths(cell: dict) -> str:
    """Of queries, and of keys where that is another."""
    return " x ".join(str(cell[name]) for name in ("length", "length_k") if name in cell)


def flop(cell: dict, direction: str) -> float:
    """Two matrix products forward, five backward; half of each where causal."""
    D, Dv = cell["head_dim"], cell.get("head_dim_v", cell["head_dim"])
    forward, backward = D + Dv, 3 * D + 2 * Dv  # S, O; S, dP, dV, dQ, dK
    depth = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    scores = cell["batch"] * cell["heads"] * cell["length"] * cell.get("length_k", cell["length"])
    return 2 * scores * depth / (2 if cell["causal"] else 1)


def inputs(cell: dict, device: str) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """q, k, v as a model makes them, [B, H, N, D] views of [B, N, H, D]; bias; dO."""
    B, N, D = cell["batch"], cell["length"], cell["head_dim"]
    H, Hk = cell["heads"], cell["heads_k"]
    Nk, Dv = cell.get("length_k", N), cell.get("head_dim_v", D)
    options = {"dtype": DTYPES[cell["dtype"]], "device": device}
    qkv = [
        torch.randn(B, *sizes, **options).transpose(1, 2).requires_grad_()
        for sizes in ((N, H, D), (Nk, Hk, D), (Nk, Hk, Dv))
    ]
    bias = None
    if cell["bias"]:
        bias = torch.randn(B, H, N, Nk, **options, requires_grad=cell["bias"] == "with gradient")
    return qkv, bias, torch.randn(B, N, H, Dv, **options).transpose(1, 2)


def naive(q: Tensor, k: Tensor, v: Tensor, is_causal=False, dropout_p=0.0) -> Tensor:
    """As one writes it down, in the dtype of its inputs."""
    N = q.shape[-2]
    S = q @ k.mT * q.shape[-1] ** -0.5  # [B, H, N, N]
    if is_causal:
        future = torch.ones(N, N, dtype=torch.bool, device=q.device).triu(1)
        S = S.masked_fill(future, -torch.inf)
    return F.dropout(torch.softmax(S, dim=-1), dropout_p) @ v


def within(name: str) -> object:
    return sdpa_kernel(BACKENDS[name]) if name in BACKENDS else nullcontext()


def forward_of(name: str, cell: dict, qkv: list[Tensor], bias: Tensor | None) -> Callable:
    """The forward of a peer: "ours", "naive", "sdpa" (which chooses) or one of its BACKENDS."""
    options = {"is_causal": cell["causal"], "dropout_p": cell["dropout_p"]}
    if name == "naive":
        return partial(naive, *qkv, **options)
    options["enable_gqa"] = cell["heads"] != cell["heads_k"]
    if name == "ours":
        return partial(flash_attn_ext.scaled_dot_product_attention, *qkv, bias, **options)

    def sdpa() -> Tensor:
        with within(name):
            return F.scaled_dot_product_attention(*qkv, bias, **options)

    return sdpa


def forwards(cell: dict, qkv: list[Tensor], bias: Tensor | None) -> dict[str, Callable]:
    """Ours, and every one of the cell's peers that takes the call."""
    calls = {"ours": forward_of("ours", cell, qkv, bias)}
    for name in cell["peers"]:
        call = forward_of(name, cell, qkv, bias)
        try:
            call()
        except RuntimeError as error:
            tqdm.write(f"{name} does not take {title(cell)}: {error}".splitlines()[0])
        else:
            calls[name] = call
    return calls


def check(cell: dict, results: dict[str, list[Tensor]]) -> None:
    """Ours against a peer; with dropout each of them drops others."""
    peers = [name for name in results if name != "ours"]
    if not peers or cell["dropout_p"] > 0:
        return
    for ours, theirs in zip(results["ours"], results[peers[0]], strict=True):
        error, largest = (ours - theirs).abs().max(), theirs.abs().max()
        assert error <= TOLERANCE[cell["dtype"]] * largest, (title(cell), peers[0], error, largest)
