"""The edges of a GPU: no memory left, many blocks, far elements, types without kernels."""

import gc
from contextlib import contextmanager

import pytest
import torch
from helpers import (
    assert_agree,
    forward_backward,
    in_new_process,
    kernel_attention,
    make_case,
    max_abs,
    naive_attention,
    needs_cuda,
)

pytestmark = needs_cuda

MIB = 2**20
GIB = 2**30


@contextmanager
def memory_left(extra: int):
    """PyTorch may take so many bytes from the driver beyond what is in use."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties("cuda").total_memory
    allowed = torch.cuda.memory_reserved() + extra
    torch.cuda.set_per_process_memory_fraction(min(allowed / total, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory():
    """Wherever it runs out: torch.OutOfMemoryError, nothing leaks, and the next call is right."""
    case = make_case(
        "causal", dtype=torch.float16, device="cuda", batch=1, heads=16, seq_q=8192, seq_k=8192,
        head_dim=64,
    )  # 16 MiB for each of q, k and v  # fmt: skip
    attention = case.bind(kernel_attention)
    grad_out = torch.randn_like(case.q)
    expected = forward_backward(attention, case.inputs, grad_out)

    failed = succeeded = 0
    for extra in range(0, 257, 16):
        before = torch.cuda.memory_allocated()
        try:
            with memory_left(extra * MIB):
                results = forward_backward(attention, case.inputs, grad_out)
        except torch.OutOfMemoryError:
            failed += 1
        else:
            succeeded += 1
            assert_agree(results, expected)
            del results
        gc.collect()  # what a traceback may hold
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        assert_agree(forward_backward(attention, case.inputs, grad_out), expected)
    assert failed >= 4 and succeeded >= 1


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "heads": 70_000},
        {"batch": 70_000, "heads": 1},
        {"batch": 35_001, "heads": 2, "seq_q": 65, "seq_k": 5},
        {"batch": 1, "heads": 1, "seq_q": 9_000_000, "seq_k": 3},
        {"batch": 1, "heads": 1, "seq_q": 3, "seq_k": 9_000_000},
    ],
    ids=["heads", "batch", "both", "queries", "keys"],
)
def test_more_blocks_than_65535(sizes):
    """gridDim.y and gridDim.z end there. Over that many keys P is too small for float16."""
    sizes = {"seq_q": 16, "seq_k": 16, **sizes}
    case = make_case(dtype=torch.bfloat16, device="cuda", head_dim=16, **sizes)
    grad_out = torch.randn_like(case.q)
    ours = forward_backward(case.bind(kernel_attention), case.inputs, grad_out)
    inputs = [x if x is None else x.float() for x in case.inputs]
    truth = forward_backward(case.bind(naive_attention), inputs, grad_out.float())
    for name, expected in truth.items():
        error = max_abs(ours[name].float() - expected)
        assert error <= 3e-2 * max_abs(expected), name


def needs_memory(bytes_needed: int):
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return pytest.mark.skipif(
        free < bytes_needed, reason=f"needs {bytes_needed / GIB:.0f} GiB of GPU memory"
    )


def assert_far_elements_agree(far, near, options):
    """Forward and backward on `far`, views with far strides, and on `near`, copies of them."""
    grad_out = torch.randn_like(kernel_attention(*near, **options))

    def attention(*inputs):
        return kernel_attention(*inputs, **options)

    ours = forward_backward(attention, far, grad_out)
    expected = forward_backward(attention, near, grad_out)
    for name in expected:
        error = max_abs(ours[name].float() - expected[name].float())
        assert error <= 4e-3 * max_abs(expected[name]), name


@needs_memory(10 * GIB)
@pytest.mark.parametrize("far_dimension", ["batch", "heads", "rows"])
def test_elements_beyond_2_to_the_31(far_dimension):
    """Offsets of elements do not fit an int."""
    shape = 2, 2, 130, 64
    strides = {
        "batch": (2**31 + 64, 130 * 64, 64, 1),
        "heads": (130 * 64, 2**31 + 64, 64, 1),
        "rows": (128, 64, 2**25, 1),  # the last row begins at 129 * 2**25 > 2**32
    }[far_dimension]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    step = 2**20  # from q to k to v
    buffer = torch.empty(extent + 2 * step, device="cuda", dtype=torch.float16)
    far = [buffer.as_strided(shape, strides, i * step) for i in range(3)]
    for x in far:
        x.normal_()
    near = [x.contiguous() for x in far]
    assert_far_elements_agree([*far, None], [*near, None], {"scale": 0.125, "window": (-1, 0)})


@needs_memory(10 * GIB)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16], ids=str)
def test_mask_beyond_2_to_the_31(dtype):
    q, k, v = (torch.randn(1, 2, 130, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    strides = (0, 2**31 + 130, 2**24, 1)
    extent = strides[1] + 129 * strides[2] + 130
    mask = torch.empty(extent, device="cuda", dtype=dtype).as_strided((1, 2, 130, 130), strides)
    mask.copy_(torch.randn(mask.shape, device="cuda").clamp(min=0))
    assert_far_elements_agree([q, k, v, mask], [q, k, v, mask.contiguous()], {"scale": 0.125})


@needs_memory(22 * GIB)
def test_results_beyond_2_to_the_31():
    """Every head is the same, so that the inputs need little memory: the results are large."""
    heads, group, seq, dim = 65_540, 20, 256, 128
    assert heads * seq * dim > 2**31
    normal = {"device": "cuda", "dtype": torch.float16}
    small = [torch.randn(1, 1, seq, dim, **normal) for _ in range(4)]
    q, k, v, grad_out = (
        x.expand(-1, number, -1, -1)
        for x, number in zip(small, (heads, heads // group, heads // group, heads))
    )
    options = {"scale": dim**-0.5, "window": (-1, 0)}

    def attention(*inputs):
        return kernel_attention(*inputs, **options)

    ops, arguments = torch.ops.flash_attn_ext, (options["scale"], -1, 0, 0, 0.0)
    out, lse = ops.attention_forward(q, k, v, None, None, *arguments)
    wanted = [True, True, True, False]
    *gradients, _ = ops.attention_backward(
        grad_out, q, k, v, None, None, out, lse, *arguments, wanted
    )
    expected = forward_backward(attention, [*small[:3], None], small[3])
    expected["dk"], expected["dv"] = expected["dk"] * group, expected["dv"] * group
    for name, result in zip(expected, (out, *gradients)):
        allowed = 4e-3 * max_abs(expected[name])
        for first in range(0, result.shape[1], 8192):
            some = result[:, first : first + 8192]
            assert max_abs(some - expected[name]) <= allowed, (name, first)


FLOAT64 = """
import torch
from flash_attn_ext import explain, scaled_dot_product_attention
from flash_attn_ext.series import naive

q, k, v = (torch.randn(1, 2, 50, 32, device="cuda", dtype=torch.float64, requires_grad=True)
           for _ in range(3))
for _ in range(2):
    out = scaled_dot_product_attention(q, k, v)
    expected = naive.attention(q, k, v, scale=32**-0.5)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v)),
                               torch.autograd.grad(expected.sum(), (q, k, v)))
explanation = explain(q, k, v)
assert explanation.kernel == "tiled" and "dtype" in explanation.reason, explanation
"""


def test_float64_takes_the_walkthrough_with_one_warning():
    process = in_new_process(FLOAT64)
    assert process.returncode == 0, process.stderr
    (warning,) = [line for line in process.stderr.splitlines() if "UserWarning" in line]
    assert "walkthrough" in warning and "dtype" in warning
