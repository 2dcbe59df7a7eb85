"""flash_attn_ext.scaled_dot_product_attention means what F.scaled_dot_product_attention means."""

import functools
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers import forward_backward, max_abs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing._internal.common_methods_invocations import op_db

from flash_attn_ext import scaled_dot_product_attention

OP_INFO = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def standard_attention(query, key, value, attn_mask=None, **options):
    """PyTorch's own attention, by its plain formula."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)


# Of the largest value. How exact a result is, is the business of test_accuracy.py.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def assert_means_the_same(query, key, value, attn_mask=None, **options):
    """The same output and gradients as SDPA's, but for rounding."""
    inputs = query, key, value, attn_mask

    def run(attention):
        return forward_backward(functools.partial(attention, **options), inputs, grad_out)

    grad_out = torch.randn_like(scaled_dot_product_attention(*inputs, **options))
    ours, theirs = run(scaled_dot_product_attention), run(standard_attention)
    for name, expected in theirs.items():
        tolerance = TOLERANCE[query.dtype] * max(1, max_abs(expected))
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=tolerance)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@dtypes
def test_op_info_samples(dtype, device):
    """The inputs that PyTorch tests its own function with."""
    samples = list(OP_INFO.sample_inputs(device, dtype, requires_grad=False))
    assert len(samples) > 10
    for sample in samples:
        options = {**sample.kwargs}
        mask = options.pop("attn_mask", None)
        if options.pop("dropout_p"):
            # Random: each has its own numbers. test_dropout.py compares them exactly.
            ours, theirs = (
                attention(sample.input, *sample.args, mask, **options, dropout_p=0.5)
                for attention in (scaled_dot_product_attention, F.scaled_dot_product_attention)
            )
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        else:
            assert_means_the_same(sample.input, *sample.args, mask, **options)


SHAPES = {  # query, key, value
    "2d": ((5, 8), (7, 8), (7, 8)),
    "3d": ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    "4d": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "5d": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)),
    "6d": ((2, 1, 2, 3, 5, 8), (2, 1, 2, 3, 7, 8), (2, 1, 2, 3, 7, 8)),
    "2d_wide_v": ((5, 8), (7, 8), (7, 11)),
    "3d_narrow_v": ((3, 5, 8), (3, 7, 8), (3, 7, 1)),
    "5d_wide_v": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 9)),
    "broadcast_key_batch": ((4, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
    "broadcast_query_batch": ((1, 3, 5, 8), (4, 3, 7, 8), (4, 3, 7, 8)),
    "broadcast_value_batch": ((4, 3, 5, 8), (4, 3, 7, 8), (1, 3, 7, 8)),
    "broadcast_heads": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "broadcast_query_heads": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "broadcast_across": ((2, 1, 5, 8), (1, 3, 7, 8), (2, 3, 7, 8)),
    "more_query_dims": ((2, 4, 3, 5, 8), (4, 3, 7, 8), (4, 3, 7, 8)),
    "more_key_dims": ((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "2d_keys": ((2, 3, 5, 8), (7, 8), (7, 8)),
    "one_key": ((2, 3, 5, 8), (2, 3, 1, 8), (2, 3, 1, 8)),
    "one_query": ((2, 3, 1, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
}


@dtypes
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": -0.7}], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(shapes, options, dtype, device):
    qkv = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    assert_means_the_same(*qkv, **options)


MASKS = {  # query, key, mask
    "2d_inputs": ((5, 8), (7, 8), (5, 7)),
    "3d_inputs": ((3, 5, 8), (3, 7, 8), (3, 5, 7)),
    "3d_inputs_2d_mask": ((3, 5, 8), (3, 7, 8), (5, 7)),
    "4d_inputs_2d_mask": ((2, 3, 5, 8), (2, 3, 7, 8), (5, 7)),
    "4d_inputs_3d_mask": ((2, 3, 5, 8), (2, 3, 7, 8), (3, 5, 7)),
    "keys": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 1, 7)),
    "keys_2d": ((2, 3, 5, 8), (2, 3, 7, 8), (1, 7)),
    "queries": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 5, 1)),
    "heads": ((2, 3, 5, 8), (2, 3, 7, 8), (1, 3, 1, 1)),
    "nothing": ((2, 3, 5, 8), (2, 3, 7, 8), (1, 1)),
    "full": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 5, 7)),
    "5d_inputs": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 1, 3, 5, 7)),
    "5d_inputs_3d_mask": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (3, 1, 7)),
    "5d_inputs_inner_batch": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (1, 2, 1, 5, 7)),
    "broadcast_batch": ((2, 3, 5, 8), (1, 3, 7, 8), (2, 1, 5, 7)),
}


@dtypes
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shapes", MASKS.values(), ids=MASKS)
def test_masks(shapes, kind, dtype, device):
    query, key, mask = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    if kind == "bool":
        mask = mask > -0.5
    assert_means_the_same(query, key, torch.randn_like(key), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_mask_with_half_precision_queries(dtype, device):
    query, key, value = (torch.randn(2, 3, 9, 8, dtype=dtype, device=device) for _ in range(3))
    mask = torch.randn(9, 9, device=device, requires_grad=True)
    out = scaled_dot_product_attention(query, key, value, mask)
    assert out.dtype == dtype
    truth = standard_attention(*(x.double() for x in (query, key, value, mask)))
    torch.testing.assert_close(out.double(), truth, rtol=0.02, atol=0.01)
    out.sum().backward()
    assert mask.grad.dtype == torch.float32 and mask.grad.shape == mask.shape


@dtypes
@pytest.mark.parametrize("heads_kv", [(6, 6), (3, 3), (2, 2), (1, 1), (2, 3), (3, 2), (1, 6)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_grouped_queries(heads_kv, options, dtype, device):
    """Key and value may even have different numbers of heads."""
    query = torch.randn(2, 6, 5, 8, dtype=dtype, device=device)
    key, value = (torch.randn(2, h, 7, 8, dtype=dtype, device=device) for h in heads_kv)
    assert_means_the_same(query, key, value, enable_gqa=True, **options)


def test_grouped_queries_in_3d_and_5d(device):
    for batch in [(), (2, 2)]:
        query = torch.randn(*batch, 6, 5, 8, device=device)
        key, value = (torch.randn(*batch, 2, 7, 8, device=device) for _ in range(2))
        assert_means_the_same(query, key, value, enable_gqa=True)


def test_grouped_queries_with_a_mask_for_every_head(device):
    query = torch.randn(2, 6, 5, 8, device=device)
    key, value = (torch.randn(2, 2, 7, 8, device=device) for _ in range(2))
    assert_means_the_same(
        query, key, value, torch.randn(2, 6, 5, 7, device=device), enable_gqa=True
    )


EMPTY = {
    "no_batch": ((0, 2, 5, 8), (0, 2, 7, 8), (0, 2, 7, 8)),
    "no_heads": ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
    "no_queries": ((2, 2, 0, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "no_keys": ((2, 2, 5, 8), (2, 2, 0, 8), (2, 2, 0, 8)),
    "no_values": ((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 0)),
    "no_head_dim": ((2, 2, 5, 0), (2, 2, 7, 0), (2, 2, 7, 8)),
    "nothing": ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
    "no_keys_2d": ((5, 8), (0, 8), (0, 8)),
}


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.5}], ids=str)
@pytest.mark.parametrize("shapes", EMPTY.values(), ids=EMPTY)
def test_empty_tensors(shapes, options, device):
    """No key to attend to gives 0; an empty head size makes all keys equal."""
    qkv = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    ours = scaled_dot_product_attention(*qkv, **options)
    theirs = standard_attention(*qkv, **options)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if "dropout_p" not in options:
        torch.testing.assert_close(ours, theirs)
    grads = torch.autograd.grad(ours.sum(), qkv)
    for x, grad, expected in zip(qkv, grads, torch.autograd.grad(theirs.sum(), qkv)):
        assert grad.shape == x.shape
        if "dropout_p" not in options:
            torch.testing.assert_close(grad, expected)


def test_no_keys_give_a_gradient_of_zero(device):
    query = torch.randn(2, 2, 5, 8, device=device, requires_grad=True)
    key = torch.randn(2, 2, 0, 8, device=device)
    scaled_dot_product_attention(query, key, key).sum().backward()
    assert not query.grad.any()


@dtypes
@pytest.mark.parametrize("scale", [-1.5, 0.0, 1e-6, 2, 0.25])
@pytest.mark.parametrize("is_causal", [False, True])
def test_scale(scale, is_causal, dtype, device):
    """PyTorch's fused CPU kernel gives NaN for a causal mask with a scale of 0 or less."""
    qkv = (torch.randn(2, 2, 9, 8, dtype=dtype, device=device) for _ in range(3))
    assert_means_the_same(*qkv, scale=scale, is_causal=is_causal)


@dtypes
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_attend_to_nothing(kind, dtype, device):
    query, key, value = (torch.randn(2, 2, 9, 8, dtype=dtype, device=device) for _ in range(3))
    mask = torch.rand(2, 1, 9, 9, device=device) < 0.5
    mask[0, :, 3] = mask[1, :, 8] = False
    if kind == "float":
        mask = torch.where(mask, 0.5, -torch.inf).to(dtype)
    assert_means_the_same(query, key, value, mask)

    results = forward_backward(
        scaled_dot_product_attention, (query, key, value, mask), torch.ones_like(query)
    )
    for name in results.keys() & {"out", "dq", "dmask"}:
        assert not results[name][0, :, 3].any() and not results[name][1, :, 8].any()


def test_no_row_attends_to_anything(device):
    qkv = [torch.randn(2, 2, 70, 8, device=device) for _ in range(3)]
    nothing = torch.zeros(70, 70, dtype=torch.bool, device=device)
    results = forward_backward(
        scaled_dot_product_attention, (*qkv, nothing), torch.ones_like(qkv[0])
    )
    for name, result in results.items():
        assert not result.any(), name


@pytest.mark.parametrize("shape", [(9, 9), (2, 1, 9, 9), (2, 3, 1, 1), (1, 9), (9, 1)], ids=str)
def test_only_the_mask_needs_a_gradient(shape, device):
    query, key, value = (torch.randn(2, 3, 9, 8, device=device) for _ in range(3))
    mask = torch.randn(shape, device=device)
    grad_out = torch.randn_like(query)

    def gradient(attention, *inputs):
        inputs[-1].requires_grad_()
        return torch.autograd.grad(attention(*inputs), inputs[-1], grad_out.to(inputs[0].dtype))[0]

    ours = gradient(scaled_dot_product_attention, query, key, value, mask.clone())
    doubles = (x.double() for x in (query, key, value, mask))
    torch.testing.assert_close(ours.double(), gradient(standard_attention, *doubles),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (7, 7), (70, 130)], ids=str)
@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_causal_biases(bias, lengths, device):
    seq_q, seq_k = lengths
    qkv = [torch.randn(2, 2, n, 8, device=device) for n in (seq_q, seq_k, seq_k)]
    diagonal = seq_k - seq_q if bias is causal_lower_right else 0
    visible = torch.ones(seq_q, seq_k, dtype=torch.bool, device=device).tril(diagonal)
    ours = scaled_dot_product_attention(*qkv, attn_mask=bias(seq_q, seq_k))
    torch.testing.assert_close(ours, standard_attention(*qkv, visible))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_out_has_the_strides_of_fused_attention(requires_grad, device):
    query = torch.randn(2, 3, 9, 8, device=device, requires_grad=requires_grad)
    out = scaled_dot_product_attention(query, query, query)
    assert out.transpose(1, 2).is_contiguous()
    assert out.requires_grad == requires_grad


def test_inputs_are_not_modified(device):
    qkv = [torch.randn(2, 3, 9, 8, device=device, requires_grad=True) for _ in range(3)]
    mask = torch.randn(9, 9, device=device, requires_grad=True)
    before = [x.detach().clone() for x in (*qkv, mask)]
    scaled_dot_product_attention(*qkv, mask).sum().backward()
    for x, expected in zip((*qkv, mask), before):
        assert torch.equal(x.detach(), expected)


def test_one_tensor_as_query_key_and_value(device):
    x = torch.randn(2, 3, 70, 16, device=device, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(scaled_dot_product_attention(x, x, x).square().sum(), x)
    (theirs,) = torch.autograd.grad(standard_attention(x, x, x).square().sum(), x)
    torch.testing.assert_close(ours, theirs)


class Logged(torch.Tensor):
    calls: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("position", range(4))
def test_torch_function_of_a_subclass(position):
    """Whichever argument is of a subclass that has its say, it is asked."""
    inputs = [torch.randn(2, 2, 9, 9) for _ in range(4)]
    expected = scaled_dot_product_attention(*inputs)
    inputs[position] = inputs[position].as_subclass(Logged)
    Logged.calls.clear()
    out = scaled_dot_product_attention(*inputs)
    assert Logged.calls
    assert isinstance(out, Logged)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected)


def test_an_int_is_a_dropout_probability_or_a_scale():
    x = torch.randn(2, 2, 9, 9)
    ours = scaled_dot_product_attention(x, x, x, dropout_p=0, scale=1)
    torch.testing.assert_close(ours, standard_attention(x, x, x, dropout_p=0, scale=1))
