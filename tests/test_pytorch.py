"""The operators among PyTorch's other machinery: autograd, autocast, transforms, threads."""

import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    RecordOps,
    assert_same_bits,
    contiguous,
    draw_rng_state,
    expanded,
    kernel_attention,
    make_case,
    permuted,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flash_attn_ext import scaled_dot_product_attention

ops = torch.ops.flash_attn_ext


def qkv(*shape, **options):
    return [torch.randn(shape or (2, 3, 9, 8), **options) for _ in range(3)]


# --- the operators themselves ----------------------------------------------------------------


@pytest.mark.parametrize("layout", [contiguous, permuted, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("features", ["", "bias+causal", "bool_mask+grouped+wide_v", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(layout, features, dtype, device):
    case = make_case(features, dtype=dtype, device=device, seq_q=5, seq_k=7, head_dim=4)
    q, k, v, mask = (x if x is None else layout(x) for x in case.inputs)
    left, right = case.options.get("window", (-1, -1))
    options = (case.options["scale"], left, right, 0, case.options.get("dropout_p", 0.0))
    rng_state = case.options.get("rng_state")

    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in (q, k, v)]
    leaf_mask = mask
    if mask is not None and mask.is_floating_point():
        leaf_mask = mask.detach().requires_grad_()
    torch.library.opcheck(ops.attention_forward.default, (*leaves, leaf_mask, rng_state, *options))

    out, lse = ops.attention_forward(q, k, v, mask, rng_state, *options)
    wanted = [True, True, True, leaf_mask is not mask]
    for grad_wanted in (wanted, [False, True, False, False]):
        torch.library.opcheck(
            ops.attention_backward.default,
            (torch.randn_like(out), q, k, v, mask, rng_state, out, lse, *options, grad_wanted),
        )


def test_gradients_not_wanted_are_empty():
    q, k, v = qkv()
    options = (0.3, -1, -1, 0, 0.0)
    out, lse = ops.attention_forward(q, k, v, None, None, *options)
    grads = ops.attention_backward(
        out, q, k, v, None, None, out, lse, *options, [False, True, False, False]
    )
    assert [tuple(grad.shape) for grad in grads] == [(0,), tuple(k.shape), (0,), (0,)]


def test_meta_tensors():
    """Shapes without data: how models are built on no device."""
    q, k, v = qkv(device="meta", dtype=torch.bfloat16)
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.device.type == "meta" and out.shape == q.shape and out.dtype == q.dtype


def test_flops():
    """Counted as PyTorch counts its own fused attention: two products forward, five backward."""
    q, k, v = qkv(2, 3, 64, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * (2 * 3 * 64 * 64 * 32)


# --- autograd --------------------------------------------------------------------------------


def test_double_backward_says_that_there_is_none():
    q, k, v = qkv(requires_grad=True)
    (dq,) = torch.autograd.grad(scaled_dot_product_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attention_backward.*not implemented"):
        dq.sum().backward()


def test_second_backward_through_a_freed_graph():
    q, k, v = qkv(requires_grad=True)
    loss = scaled_dot_product_attention(q, k, v).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_input_modified_before_the_backward():
    q, k, v = qkv(requires_grad=True)
    doubled = k * 2
    loss = scaled_dot_product_attention(q, doubled, v).sum()
    with torch.no_grad():
        doubled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_saved_tensor_hooks(device):
    """Offloading: what is saved goes through the hooks, and none of it is quadratic."""
    q, k, v = qkv(1, 2, 300, 8, device=device, requires_grad=True)
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x.to("cpu", copy=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.to(device)):
        loss = scaled_dot_product_attention(q, k, v, is_causal=True).sum()
    assert saved and max(saved) < 300 * 300
    grads = torch.autograd.grad(loss, (q, k, v))
    loss = scaled_dot_product_attention(q, k, v, is_causal=True).sum()
    for grad, expected in zip(grads, torch.autograd.grad(loss, (q, k, v))):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, device):
    q, k, v = qkv(device=device, requires_grad=True)
    expected = scaled_dot_product_attention(q, k, v)
    with mode():
        out = scaled_dot_product_attention(q, k, v)
    assert not out.requires_grad
    assert torch.equal(out, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, device):
    """The second forward drops what the first did."""
    q, k, v = qkv(device=device, requires_grad=True)

    def attention(q, k, v):
        return scaled_dot_product_attention(q, k, v, dropout_p=0.3)

    torch.manual_seed(5)
    expected = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v))
    torch.manual_seed(5)
    checkpoint(attention, q, k, v, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, grad in zip((q, k, v), expected):
        assert torch.equal(leaf.grad, grad)


# --- autocast --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, mask_dtype, device):
    q, k, v = qkv(device=device, requires_grad=True)
    mask = None if mask_dtype is None else torch.randn(9, 9, device=device).to(mask_dtype)
    with torch.autocast(device, dtype=dtype):
        out = scaled_dot_product_attention(q, k, v, mask)
        assert F.scaled_dot_product_attention(q, k, v, mask).dtype == out.dtype == dtype
    lowered = mask if mask_dtype in (None, torch.bool) else mask.to(dtype)
    assert torch.equal(
        out, scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), lowered)
    )
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(device):
    q, k, v = qkv(device=device, dtype=torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = scaled_dot_product_attention(q, k, v)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.float64


def test_autocast_joins_mixed_dtypes(device):
    q, k, v = qkv(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = scaled_dot_product_attention(q, k.bfloat16(), v.half())
    assert out.dtype == torch.bfloat16


def test_backward_outside_autocast_equals_backward_inside(device):
    q, k, v = qkv(device=device, requires_grad=True)
    grads = []
    for inside in (False, True):
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = scaled_dot_product_attention(q, k, v).float().square().sum()
            if inside:
                grads.append(torch.autograd.grad(loss, (q, k, v)))
        if not inside:
            grads.append(torch.autograd.grad(loss, (q, k, v)))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


# --- transforms ------------------------------------------------------------------------------


def plain(q, k, v, mask=None):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + (0 if mask is None else mask), -1) @ v


def squared(attention):
    return lambda *inputs: attention(*inputs).square().sum()


IN_DIMS = {
    "all": (0, 0, 0),
    "other_dims": (1, 2, 0),
    "last": (-1, 0, 0),
    "query": (0, None, None),
    "key": (None, 0, None),
    "key_value": (None, 0, 0),
}


def mapped_inputs(in_dims, dtype=torch.float64):
    shape = (2, 3, 9, 8)
    inputs = [torch.randn(shape, dtype=dtype) for _ in range(3)] + [torch.randn(9, 9, dtype=dtype)]
    return [
        x if dim is None else torch.stack([x + i for i in range(4)], dim=dim)
        for x, dim in zip(inputs, in_dims)
    ]


@pytest.mark.parametrize("in_dims", IN_DIMS.values(), ids=IN_DIMS)
def test_vmap(in_dims):
    inputs = mapped_inputs(in_dims)
    ours = torch.vmap(scaled_dot_product_attention, in_dims)(*inputs)
    torch.testing.assert_close(ours, torch.vmap(plain, in_dims)(*inputs))


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, 0, 0, None), (None, None, None, 1)])
def test_vmap_over_masks(in_dims):
    inputs = mapped_inputs(in_dims)
    ours = torch.vmap(scaled_dot_product_attention, in_dims)(*inputs)
    torch.testing.assert_close(ours, torch.vmap(plain, in_dims)(*inputs))


def test_vmap_nested():
    inputs = [torch.randn(3, 4, 9, 8, dtype=torch.float64) for _ in range(3)]
    ours = torch.vmap(torch.vmap(scaled_dot_product_attention))(*inputs)
    torch.testing.assert_close(ours, plain(*inputs))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap_of_dropout(randomness):
    """As torch.dropout has it: each element draws its own, or all draw the same."""
    x = torch.randn(1, 3, 9, 8).expand(4, -1, -1, -1)
    out = torch.vmap(
        lambda x: scaled_dot_product_attention(x, x, x, dropout_p=0.5), randomness=randomness
    )(x)
    for i in range(1, 4):
        assert torch.equal(out[0], out[i]) == (randomness == "same")


def test_func_grad():
    inputs = [torch.randn(2, 3, 9, 8, dtype=torch.float64) for _ in range(3)]
    inputs.append(torch.randn(9, 9, dtype=torch.float64))
    ours, theirs = (
        torch.func.grad(squared(attention), argnums=(0, 1, 2, 3))(*inputs)
        for attention in (scaled_dot_product_attention, plain)
    )
    torch.testing.assert_close(ours, theirs)


def test_func_vjp_and_jacrev():
    q, k, v = (torch.randn(1, 1, 3, 4, dtype=torch.float64) for _ in range(3))
    for transform in (
        lambda f: torch.func.jacrev(f)(q, k, v),
        lambda f: torch.func.vjp(f, q, k, v)[1](torch.ones_like(q)),
    ):
        torch.testing.assert_close(transform(scaled_dot_product_attention), transform(plain))


@pytest.mark.parametrize("mask_dim", [None, 0])
def test_per_sample_gradients(mask_dim):
    """vmap of grad: how the gradient of each sample alone is computed."""
    in_dims = (0, None, 0, mask_dim)
    inputs = mapped_inputs(in_dims)
    ours, theirs = (
        torch.vmap(torch.func.grad(squared(attention), argnums=(0, 1, 2, 3)), in_dims)(*inputs)
        for attention in (scaled_dot_product_attention, plain)
    )
    torch.testing.assert_close(ours, theirs)


def test_vmap_of_autograd():
    """torch.autograd.grad(is_grads_batched=True) maps the backward operator alone."""
    q, k, v = qkv(dtype=torch.float64, requires_grad=True)
    grad_outs = torch.randn(5, *q.shape, dtype=torch.float64)
    batched = torch.autograd.grad(
        scaled_dot_product_attention(q, k, v), (q, k, v), grad_outs, is_grads_batched=True
    )
    for i, grad_out in enumerate(grad_outs):
        out = scaled_dot_product_attention(q, k, v)
        for grad, all_of_them in zip(torch.autograd.grad(out, (q, k, v), grad_out), batched):
            torch.testing.assert_close(all_of_them[i], grad)


# --- threads and modes -----------------------------------------------------------------------


def test_python_threads_at_once(device):
    cases = [make_case("causal+bias", device=device, seq_q=80 + i, seq_k=150) for i in range(4)]

    def work(case, results):
        for _ in range(10):
            leaves = [x.detach().requires_grad_() for x in case.inputs]
            out = case.bind(kernel_attention)(*leaves)
            grads = torch.autograd.grad(out.sum(), leaves)
            results.append(dict(zip(("out", "dq", "dk", "dv", "dmask"), (out, *grads))))

    alone: list = []
    for case in cases:
        work(case, alone)
    together: list[list] = [[] for _ in cases]
    workers = [
        threading.Thread(target=work, args=(case, results))
        for case, results in zip(cases, together)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results, expected in zip(together, alone[::10]):
        assert len(results) == 10
        for result in results:
            assert_same_bits(result, expected)


def test_one_operator_a_call():
    """Nothing is expanded, cast or masked around the kernel."""
    q, k, v = qkv()
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    with RecordOps() as record:
        scaled_dot_product_attention(q, k, v, mask)
    views = {"aten::view", "aten::expand", "aten::transpose.int", "aten::unsqueeze"}
    assert set(record.names) - views == {"flash_attn_ext::attention_forward"}


def test_rng_state_alone_decides_what_is_dropped(device):
    q, k, v = qkv(device=device)
    rng_state = draw_rng_state(device)
    first, second = (kernel_attention(q, k, v, dropout_p=0.5, rng_state=rng_state) for _ in "12")
    assert torch.equal(first, second)
