"""What the tests share: one way to call every attention, the accuracy rule, cases and layouts."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_ext.series import naive, tiled

Tensor = torch.Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NO_LIMIT = -1

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


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

    def run(self, attention: Callable) -> Tensor:
        return attention(*self.inputs, **self.options)

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


def convert(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x.to(dtype) if differentiable(x) else x


def max_abs(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def forward_backward(attention: Callable, inputs, grad_out: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every input that has one. Layouts are kept."""
    leaves = [x.detach().requires_grad_() if differentiable(x) else x for x in inputs]
    out = attention(*leaves)
    wanted = {f"d{name}": x for name, x in zip("q k v mask".split(), leaves) if differentiable(x)}
    gradients = torch.autograd.grad(out, list(wanted.values()), grad_out)
    return {"out": out.detach(), **dict(zip(wanted, gradients))}


def assert_accurate(case: Case, attention: Callable = kernel_attention) -> None:
    """max|ours - truth| <= max|standard - truth| + floor, for the output and every gradient.

    The truth is naive attention in float64, the standard is naive attention in our dtype.
    """
    dtype = case.q.dtype
    with torch.no_grad():
        grad_out = torch.randn_like(case.run(attention))
    ours = forward_backward(case.bind(attention), case.inputs, grad_out)

    def naive_in(dtype):
        inputs = [convert(x, dtype) for x in case.inputs]
        return forward_backward(case.bind(naive_attention), inputs, grad_out.to(dtype))

    truth = naive_in(torch.float64)
    if dtype == torch.float64:
        # The truth has the standard's own error. How large that is shows float32: rounding
        # errors are proportional to epsilon. Twice, since ours and the truth each have it.
        standard, ratio = naive_in(torch.float32), 2 * EPS[torch.float64] / EPS[torch.float32]
    else:
        standard, ratio = forward_backward(case.bind(naive_attention), case.inputs, grad_out), 1.0
    kept = errors_of_what_is_kept(case, grad_out, truth)
    terms = size_of_terms(case, grad_out)

    # Of two computations with equal care either may be the luckier. Hence a floor:
    # - one unit in the last place of the largest result;
    # - in the type that sums are kept in, 2 units more for the sums (of their terms, where these
    #   cancel), and for the scores: exp makes of an absolute error of S a relative error of P, and
    #   S, D products summed up one by one and the log-sum-exp taken off, is wrong by up to about
    #   eps |q| |k|.
    scores = max_abs(case.q.double().norm(dim=-1)) * max_abs(case.k.double().norm(dim=-1))
    scores *= abs(case.options["scale"])
    if differentiable(case.mask):
        scores += max_abs(case.mask)

    for name, expected in truth.items():
        result = ours[name]
        assert result.shape == expected.shape, name
        assert result.isfinite().all(), f"{name} is not finite"
        error = max_abs(result.double() - expected)
        standards = ratio * max_abs(standard[name].double() - expected)
        largest = max_abs(expected)
        floor = max(EPS[dtype], EPS[result.dtype]) * largest
        floor += eps_of_sums(dtype) * (2 + scores) * max(largest, terms[name])
        allowed = max(standards, kept[name]) + floor
        assert error <= allowed, (
            f"{name}: error {error:.3g}; standard attention's {standards:.3g}, from what is kept "
            f"{kept[name]:.3g}, floor {floor:.3g}; largest value {max_abs(expected):.3g}"
        )


def size_of_terms(case: Case, grad_out: Tensor) -> dict[str, float]:
    """What a sum would be if its terms did not cancel: the root of the sum of their squares.

    dS = P * (dP - delta) counts as two terms, and over all of a row it sums up to 0.
    """
    q, k, v, mask = (convert(x, torch.float64) for x in case.inputs)
    group = q.shape[1] // k.shape[1]
    identity = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:3], -1)
    P = naive_attention(q, k, identity, mask=mask, **case.options)  # [B, Hq, Sq, Sk]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    dO = grad_out.double()
    delta = ((P @ v) * dO).sum(dim=-1, keepdim=True)  # [B, Hq, Sq, 1]
    P = P.square()
    dS = P * ((dO @ v.mT).square() + delta.square())  # [B, Hq, Sq, Sk]
    scale = case.options["scale"] ** 2
    squares = {
        "out": P @ v.square(),
        "dq": scale * dS @ k.square(),
        "dk": scale * (dS.mT @ q.square()).unflatten(1, (-1, group)).sum(dim=2),
        "dv": (P.mT @ dO.square()).unflatten(1, (-1, group)).sum(dim=2),
    }
    if differentiable(mask):
        squares["dmask"] = dS.sum_to_size(mask.shape)
    return {name: max_abs(square) ** 0.5 for name, square in squares.items()}


def eps_of_sums(dtype: torch.dtype) -> float:
    return EPS[torch.float64 if dtype == torch.float64 else torch.float32]


def errors_of_what_is_kept(
    case: Case, grad_out: Tensor, truth: dict[str, Tensor]
) -> dict[str, float]:
    """How far off a backward in float64 is if what the forward keeps was rounded on the way.

    Standard attention keeps P; FlashAttention keeps the output and the log-sum-exp, and takes
    dS = P * (dP - delta) from delta = dO . O. Where that cancels (over a single key dS is 0), the
    roundings of O, and of P before it, to our dtype remain, and those of the sums dP and delta.
    All are random; taken here is four times their standard deviation, all with one sign.
    """
    dtype, eps_sum = case.q.dtype, eps_of_sums(case.q.dtype)
    q, k, v, mask = (convert(x, torch.float64) for x in case.inputs)
    dO = grad_out.double()
    options = dict(case.options)
    rng_state = options.pop("rng_state", None)
    out, lse = tiled.forward(q, k, v, mask, rng_state, **options)

    eps = 2 * (EPS[dtype] / math.sqrt(v.shape[-1]) + eps_sum)
    out = out + eps * out.abs() * dO.sign()
    lse = lse * (1 + eps_sum)
    gradients = tiled.backward(
        dO, q, k, v, mask, rng_state, out, lse, **options, mask_grad=differentiable(mask)
    )
    errors = {
        name: max_abs(gradient - truth[name])
        for name, gradient in zip(("dq", "dk", "dv", "dmask"), gradients)
        if gradient is not None
    }
    if "dmask" in errors:  # a sum of rows whose errors have random signs in fact
        rows = lse.isfinite().sum().item() / (mask.numel() / mask.shape[-1])
        errors["dmask"] /= math.sqrt(max(rows, 1))
    return {"out": 0.0, **errors}


@contextmanager
def deterministic_algorithms():
    """On a GPU, only then do gradients have the same bits every run."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, expected in b.items():
        assert torch.equal(a[name], expected), f"{name}: {max_abs(a[name] - expected):.3g} apart"


def assert_agree(a: dict[str, Tensor], b: dict[str, Tensor], *, same_forward: bool = True) -> None:
    """The same results up to the order in which the CUDA backward's blocks add up their dQ.

    Where not even the forward was the same kernel, up to rounding.
    """
    assert a.keys() == b.keys()
    if same_forward:
        assert torch.equal(a["out"], b["out"]), f"out: {max_abs(a['out'] - b['out']):.3g} apart"
    for name, expected in b.items():
        error, largest = max_abs(a[name].double() - expected), max_abs(expected)
        allowed = (4 * EPS[expected.dtype] + 32 * EPS[torch.float32]) * largest
        assert error <= allowed, f"{name}: {error:.3g} apart, largest value {largest:.3g}"


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


# A forward and a backward on a GPU, twice, as a program of its own would run them.
TRAIN = """
import torch
from flash_attn_ext import explain, scaled_dot_product_attention
from flash_attn_ext.series import naive

q, k, v = (torch.randn(1, 2, 100, 64, device="cuda", dtype=torch.float16, requires_grad=True)
           for _ in range(3))
for _ in range(2):
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = naive.attention(q.float(), k.float(), v.float(), scale=0.125, window=(-1, 0))
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=2e-3)
    for ours, theirs in zip(torch.autograd.grad(out.sum(), (q, k, v)),
                            torch.autograd.grad(expected.sum(), (q, k, v))):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-3)
print(explain(q, k, v, is_causal=True))
"""


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
