"""Plain calls take a short cut through C++: to the same bits, and only where nothing is missed."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from flash_attn_ext import _C, scaled_dot_product_attention

DEFAULTS = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def inputs(heads_k=4, device="cpu", dtype=torch.float32):
    shapes = (2, 4, 7, 16), (2, heads_k, 9, 16), (2, heads_k, 9, 24)
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def short_cut(*tensors, **options):
    return _C.attention(*tensors, *(DEFAULTS | options).values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "scale": -0.3},
        {"dropout_p": 0.5},
        {"attn_mask": torch.rand(7, 9) < 0.7},
        {"attn_mask": torch.randn(4, 7, 9)},
        {"attn_mask": torch.rand(2, 1, 1, 9) < 0.7},
        {"enable_gqa": True},
    ],
    ids=["plain", "causal", "dropout", "2d", "3d", "4d", "grouped"],
)
def test_same_bits(options, device, monkeypatch):
    heads_k = 2 if options.get("enable_gqa") else 4
    leaves = [x.requires_grad_() for x in inputs(heads_k, device)]
    options = {k: v.to(device) if k == "attn_mask" else v for k, v in options.items()}

    def results():
        torch.manual_seed(3)
        out = scaled_dot_product_attention(*leaves, **options)
        return out, *torch.autograd.grad(out.sum(), leaves)

    assert short_cut(*leaves, **options) is not None
    short = results()
    monkeypatch.setattr(_C, "attention", lambda *arguments: None)
    long = results()
    assert short[0].stride() == long[0].stride()
    for ours, expected in zip(short, long, strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=1e-5, atol=1e-5
        )  # dQ is summed in any order
    assert torch.equal(short[0], long[0])


q, k, v = inputs()


@pytest.mark.parametrize(
    ("tensors", "options"),
    [
        ((q[0], k[0], v[0]), {}),
        ((q[:1], k, v), {}),
        ((q, k[:, :2], v[:, :2]), {}),
        ((q, k[:, :3], v[:, :3]), {"enable_gqa": True}),
        ((q, k.double(), v), {}),
        ((q, k[..., :8], v), {}),
        ((q, k, v[:, :, :5]), {}),
        ((q.to("meta"), k, v), {}),
        ((q.to_sparse(), k, v), {}),
        ((q.long(), k.long(), v.long()), {}),
        ((q.tolist(), k, v), {}),
        ((q, k, v), {"attn_mask": torch.ones(7, 9).bool(), "is_causal": True}),
        ((q, k, v), {"attn_mask": torch.ones(7, 8).bool()}),
        ((q, k, v), {"attn_mask": torch.ones(7, 1).bool().expand(7, 9)}),
        ((q, k, v), {"attn_mask": torch.ones(7, 9).double()}),
        ((q, k, v), {"attn_mask": 1}),
        ((q, k, v), {"dropout_p": 1.5}),
        ((q, k, v), {"dropout_p": float("nan")}),
        ((q, k, v), {"dropout_p": 0}),
        ((q, k, v), {"is_causal": 1}),
        ((q, k, v), {"scale": "1"}),
        ((q, k, v), {"enable_gqa": None}),
    ],
)
def test_left_to_python(tensors, options):
    assert short_cut(*tensors, **options) is None


def test_seen_by_modes_and_transforms():
    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += func is scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    with Count() as mode:
        scaled_dot_product_attention(q, k, v)
    assert mode.calls == 1

    def call(q):
        assert short_cut(q, k, v) is None
        return scaled_dot_product_attention(q, k, v).sum()

    torch.func.grad(call)(q)


def test_autocast():
    half = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        assert short_cut(q, k, v) is None  # has to be cast
        assert scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert short_cut(*half).dtype == torch.bfloat16


def test_number_of_arguments():
    assert _C.attention() is None
    assert _C.attention(q, k, v) is None
