"""What the tests share: one way to call every attention, the accuracy rule, cases and layouts."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_ext.series import naive

Tensor = torch.Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NO_LIMIT = -1


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    window: tuple[int, int] = (NO_LIMIT, NO_LIMIT),
    diagonal_offset: int = 0,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> Tensor:
    """The operator, called as naive.attention and tiled.attention are."""
    out, _ = torch.ops.flash_attn_ext.attention_forward(
        q, k, v, mask, rng_state, scale, *window, diagonal_offset, dropout_p
    )
    return out


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options):
    return naive.attention(q, k, v, mask=mask, **options)


def draw_rng_state(device: str = "cpu") -> Tensor:
    """As the Python API draws it, so that torch.manual_seed tells a test what a call will draw."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


# --- cases -----------------------------------------------------------------------------------


@dataclass
class Case:
    """The inputs of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    options: dict = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.mask

    def bind(self, attention: Callable) -> Callable:
        """attention as a function of q, k, v and mask alone."""
        return lambda *inputs: attention(*inputs, **self.options)


# Features that exclude one another share a group.
FEATURES = {
    "causal": "window",
    "bottom_right": "window",
    "window": "window",
    "bool_mask": "mask",
    "key_mask": "mask",
    "bias": "mask",
    "fp32_bias": "mask",
    "head_bias": "mask",
    "query_bias": "mask",
    "negative_scale": "scale",
    "zero_scale": "scale",
    "grouped": "heads",
    "one_kv_head": "heads",
    "wide_v": "head_dim_v",
    "narrow_v": "head_dim_v",
    "dropout": "dropout",
}
FEATURE_PAIRS = [
    f"{a}+{b}"
    for a, b in itertools.combinations(FEATURES, 2)
    if FEATURES[a] != FEATURES[b]
]  # fmt: skip


def make_case(
    features: str = "",
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch: int = 2,
    heads: int = 4,
    seq_q: int = 70,
    seq_k: int = 90,
    head_dim: int = 32,
) -> Case:
    """Random inputs with the named features ("causal+dropout") of FEATURES."""
    wanted = set(features.split("+")) - {""}
    assert wanted <= FEATURES.keys(), wanted
    heads_k = 1 if "one_kv_head" in wanted else heads // 2 if "grouped" in wanted else heads
    head_dim_v = head_dim + 3 * (("wide_v" in wanted) - ("narrow_v" in wanted))
    normal = {"dtype": dtype, "device": device}

    mask = None
    if "bool_mask" in wanted:
        mask = torch.rand(batch, heads, seq_q, seq_k, device=device) < 0.7
    elif "key_mask" in wanted:
        mask = torch.rand(batch, 1, 1, seq_k, device=device) < 0.7
    elif "bias" in wanted:
        mask = torch.randn(batch, heads, seq_q, seq_k, **normal)
    elif "fp32_bias" in wanted:
        mask = torch.randn(1, heads, seq_q, seq_k, device=device)
    elif "head_bias" in wanted:
        mask = torch.randn(1, heads, 1, seq_k, **normal)
    elif "query_bias" in wanted:
        mask = torch.randn(batch, 1, seq_q, seq_k, **normal)

    options = {"scale": 1 / math.sqrt(head_dim)}
    if "causal" in wanted:
        options.update(window=(NO_LIMIT, 0))
    elif "bottom_right" in wanted:
        options.update(window=(NO_LIMIT, 0), diagonal_offset=seq_k - seq_q)
    elif "window" in wanted:
        options.update(window=(seq_k // 4, seq_k // 8), diagonal_offset=1)
    if "negative_scale" in wanted:
        options.update(scale=-0.3)
    elif "zero_scale" in wanted:
        options.update(scale=0.0)
    if "dropout" in wanted:
        options.update(dropout_p=0.3, rng_state=draw_rng_state(device))

    return Case(
        q=torch.randn(batch, heads, seq_q, head_dim, **normal),
        k=torch.randn(batch, heads_k, seq_k, head_dim, **normal),
        v=torch.randn(batch, heads_k, seq_k, max(head_dim_v, 1), **normal),
        mask=mask,
        options=options,
    )


# --- the accuracy rule -----------------------------------------------------------------------

EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def differentiable(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def forward_backward(attention: Callable, inputs, grad_out: Tensor, **options) -> dict[str, Tensor]:
    """The output and the gradient of every input that has one. Layouts are kept."""
    leaves = [x.detach().requires_grad_() if differentiable(x) else x for x in inputs]
    out = attention(*leaves, **options)
    wanted = {
        f"d{name}": x for name, x in zip(["q", "k", "v", "mask"], leaves) if differentiable(x)
    }
    gradients = torch.autograd.grad(out, list(wanted.values()), grad_out)
    return {"out": out.detach(), **dict(zip(wanted, gradients))}


def convert(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x.to(dtype) if differentiable(x) else x


def max_abs(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_accurate(inputs, attention=kernel_attention, reference=naive_attention, **options):
    """max|ours - truth| <= max|standard - truth| + floor, for the output and every gradient.

    The truth is the reference in float64; the standard is the same reference, which is attention
    as PyTorch's documentation writes it, in our dtype.
    """
    dtype = inputs[0].dtype
    with torch.no_grad():
        grad_out = torch.randn_like(attention(*inputs, **options))
    ours = forward_backward(attention, inputs, grad_out, **options)

    def reference_in(dtype):
        converted = [convert(x, dtype) for x in inputs]
        return forward_backward(reference, converted, grad_out.to(dtype), **options)

    truth = reference_in(torch.float64)
    if dtype == torch.float64:
        # The truth has the standard's own error. How large that is shows float32: rounding
        # errors are proportional to epsilon. Twice, since ours and the truth each have it.
        standard = reference_in(torch.float32)
        ratio = 2 * EPS[torch.float64] / EPS[torch.float32]
    else:
        standard, ratio = reference_in(dtype), 1.0
    floors = rounding_floors(inputs, grad_out, ours, options.get("scale"))

    for name, expected in truth.items():
        assert ours[name].shape == expected.shape, name
        assert ours[name].isfinite().all(), f"{name} is not finite"
        error = max_abs(ours[name].double() - expected)
        allowed = ratio * max_abs(standard[name].double() - expected) + floors[name]
        assert error <= allowed, (
            f"{name}: error {error:.3g}, allowed {allowed:.3g} (of it floor {floors[name]:.3g}), "
            f"largest value {max_abs(expected):.3g}"
        )


def rounding_floors(
    inputs, grad_out: Tensor, results: dict[str, Tensor], scale: float | None
) -> dict[str, float]:
    """What is left to chance: of two computations with equal care either may be the luckier.

    - Rounding a result: 2 units in the last place of its largest value.
    - Rounding the scores, in the type that sums are kept in: exp makes of an absolute error of S a
      relative error of P. Summing D products one by one, S is off by about eps / 2 * |q| |k|.
    - The gradients of q, k and mask come from dS = P * (dP - delta), which can cancel to nothing
      (over a single key it is 0). What remains is the rounding of dP, a sum of Dv products of
      random sign, spread over Sk keys by P.
    """
    q, k, v, mask = inputs
    eps_sum = EPS[torch.float64 if q.dtype == torch.float64 else torch.float32]
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else abs(scale)

    scores = scale * max_abs(q.double().norm(dim=-1)) * max_abs(k.double().norm(dim=-1))
    if differentiable(mask):
        scores += max_abs(mask[mask.isfinite()])
    dS = max_abs(grad_out) * max_abs(v) * math.sqrt(v.shape[-1] / max(k.shape[-2], 1))
    cancelled = {"dq": scale * dS * max_abs(k), "dk": scale * dS * max_abs(q), "dmask": dS}
    return {
        name: (2 * EPS[result.dtype] + eps_sum * scores / 2) * max_abs(result)
        + 4 * eps_sum * cancelled.get(name, 0.0)
        for name, result in results.items()
    }


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, expected in b.items():
        assert torch.equal(a[name], expected), f"{name}: {max_abs(a[name] - expected):.3g} apart"


# --- layouts ---------------------------------------------------------------------------------


def surroundings(x: Tensor, *shape: int) -> Tensor:
    """Memory that nobody may read: NaN, or for a bool mask True (pay attention)."""
    return torch.full(shape, True if x.dtype == torch.bool else math.nan, dtype=x.dtype,
                      device=x.device)  # fmt: skip


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def permuted(x: Tensor) -> Tensor:
    """(B, S, H, D) in memory, as models that never permute have it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def packed(x: Tensor) -> Tensor:
    """The middle part of one (B, S, 3, H, D) tensor, as a fused projection of q, k, v gives."""
    batch, heads, seq, dim = x.shape
    buffer = surroundings(x, batch, seq, 3, heads, dim)
    buffer[:, :, 1] = x.transpose(1, 2)
    return buffer[:, :, 1].transpose(1, 2)


def padded(x: Tensor) -> Tensor:
    """Cut out of a tensor that is larger in every dimension."""
    batch, heads, seq, dim = x.shape
    buffer = surroundings(x, batch + 1, heads + 1, seq + 5, dim + 7)
    buffer[:batch, :heads, 2 : seq + 2, 3 : dim + 3] = x
    return buffer[:batch, :heads, 2 : seq + 2, 3 : dim + 3]


def last_dim_strided(x: Tensor) -> Tensor:
    """(B, H, D, S) in memory."""
    return x.mT.contiguous().mT


def unaligned(x: Tensor) -> Tensor:
    """Contiguous, and starting one element into its memory."""
    buffer = surroundings(x, x.numel() + 2)
    return buffer[1:-1].view(x.shape).copy_(x)


def expanded(x: Tensor) -> Tensor:
    """One batch entry seen as many: other values than x has."""
    return x[:1].expand_as(x)


LAYOUTS = [contiguous, permuted, packed, padded, last_dim_strided, unaligned, expanded]


# --- processes -------------------------------------------------------------------------------


def in_new_process(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- which operators ran ---------------------------------------------------------------------


class RecordOps(TorchDispatchMode):
    """The names of the operators that a block of code ran, below autograd."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))

    @property
    def used_ours(self) -> bool:
        return "flash_attn_ext::attention_forward" in self.names
