"""Strides, alignment, and memory around the tensors: none of them may change a bit."""

import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_agree,
    assert_same_bits,
    contiguous,
    deterministic_algorithms,
    expanded,
    forward_backward,
    kernel_attention,
    last_dim_strided,
    make_case,
    permuted,
)

INPUTS = ["q", "k", "v", "mask"]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def rows_are_aligned(x):
    """To 16 bytes, or copied by us to where they are."""
    starts = x.data_ptr(), *(stride * x.itemsize for stride in x.stride()[:-1])
    return x.stride(-1) != 1 or all(start % 16 == 0 for start in starts)


def assert_layouts_agree(case, layout_of, grad_layout=contiguous):
    given = [(name, x) for name, x in zip(INPUTS, case.inputs) if x is not None]
    inputs = [layout_of.get(name, contiguous)(x) for name, x in given]
    copies = [x.contiguous() for x in inputs]
    grad_out = grad_layout(torch.randn_like(copies[0] @ copies[1].mT @ copies[2]))
    attention = case.bind(kernel_attention)
    with deterministic_algorithms():
        results = forward_backward(attention, inputs, grad_out)
        expected = forward_backward(attention, copies, grad_out.contiguous())
    if not case.q.is_cuda:
        assert_same_bits(results, expected)
    elif case.q.dtype.itemsize > 2:  # their backward is products of PyTorch's, of any layout
        assert_agree(results, expected)
    elif not all(map(rows_are_aligned, inputs[:3])):  # there is another forward for those that are
        assert_agree(results, expected, same_forward=False)
    else:
        assert_same_bits(results, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@layouts
def test_all_inputs(layout, dtype, device):
    """Most layouts cut the input out of a buffer filled with NaN."""
    case = make_case("bias+dropout+window", dtype=dtype, device=device)
    assert_layouts_agree(case, dict.fromkeys(INPUTS, layout))


@pytest.mark.parametrize("features", ["bias", "bool_mask+causal"])
@pytest.mark.parametrize("name", INPUTS)
@layouts
def test_one_input(layout, name, features, device):
    case = make_case(features, device=device, seq_q=33, seq_k=41, head_dim=20)
    assert_layouts_agree(case, {name: layout})


@layouts
def test_gradient_of_the_output(layout, device):
    assert_layouts_agree(make_case("causal", device=device), {}, grad_layout=layout)


@pytest.mark.parametrize("broadcast", ["bh", "b", "h", "q", "k", "bq", "hk", "bhq", "bhqk"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_broadcast_mask(broadcast, dtype, device):
    """A mask with dimensions of size 1 is the expanded mask; its gradient is summed over them."""
    case = make_case("bias", dtype=torch.bfloat16 if dtype.itemsize == 2 else torch.float32,
                     device=device)  # fmt: skip
    shape = [1 if name in broadcast else size for name, size in zip("bhqk", case.mask.shape)]
    mask = torch.randn(shape, device=device)
    mask = mask > -0.5 if dtype == torch.bool else mask.to(dtype)
    attention = case.bind(kernel_attention)
    grad_out = torch.randn_like(attention(*case.inputs))

    def run(mask):
        return forward_backward(attention, (case.q, case.k, case.v, mask), grad_out)

    ours, full = run(mask), run(mask.expand_as(case.mask).contiguous())
    dmask, full_dmask = ours.pop("dmask", None), full.pop("dmask", None)
    assert_agree(ours, full, same_forward=False)  # another kernel may be the one for such a mask
    if dmask is not None:
        assert dmask.dtype == mask.dtype
        summed = full_dmask.double().sum_to_size(shape)
        # The terms of the sum on the right were rounded to the mask's dtype, those of ours not.
        count = full_dmask.numel() // mask.numel()
        tolerance = torch.finfo(dtype).eps * full_dmask.abs().max().item() * max(8, count**0.5)
        torch.testing.assert_close(
            dmask.double(), summed, rtol=4 * torch.finfo(dtype).eps, atol=tolerance
        )


def test_output_is_ready_for_the_projection(device):
    """(B, Sq, Hq, Dv) in memory, as SDPA's fused kernels have it: reshaping it is free."""
    case = make_case("wide_v", device=device)
    out = case.run(kernel_attention)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", [contiguous, permuted], ids=lambda layout: layout.__name__)
def test_gradients_have_the_strides_of_their_inputs(layout, device):
    case = make_case("wide_v", device=device)
    inputs = [layout(x) for x in (case.q, case.k, case.v)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = case.bind(kernel_attention)(*leaves)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert grad.stride() == leaf.stride()


@pytest.mark.parametrize("layout", [expanded, last_dim_strided], ids=lambda layout: layout.__name__)
def test_gradient_reaches_the_tensor_behind_a_view(layout, device):
    case = make_case(device=device)
    attention = case.bind(kernel_attention)
    base = case.k.requires_grad_()
    with deterministic_algorithms():
        attention(case.q, layout(base), case.v).sum().backward()
        through_view, base.grad = base.grad, None
        attention(case.q, layout(base).contiguous(), case.v).sum().backward()
    assert torch.equal(through_view, base.grad)


# --- NaN that is attended to does come through -----------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_query(dtype, device):
    case = make_case(dtype=dtype, device=device)
    case.q[1, 2, 33, 5] = torch.nan
    out = case.run(kernel_attention)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[1, 2, 33] = True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_key(dtype, device):
    case = make_case("causal", dtype=dtype, device=device)
    case.k[1, 2, 33, 5] = torch.nan
    out = case.run(kernel_attention)
    assert out[1, 2, 33:].isnan().all()
    assert not out[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_value(dtype, device):
    case = make_case(dtype=dtype, device=device)
    case.v[1, 2, 33, 5] = torch.nan
    out = case.run(kernel_attention)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[1, 2, :, 5] = True
    assert torch.equal(out.isnan(), expected)
