"""What a forward and a backward take from PyTorch's allocator beyond their results, to the byte."""

import pytest
import torch
from helpers import make_case, needs_cuda

pytestmark = needs_cuda

ops = torch.ops.flash_attn_ext
KIB = 2**10


def peak_bytes(call) -> tuple[int, object]:
    """By how much the bytes asked for (not what they are rounded up to) peaked; the results."""

    def requested(which: str) -> int:
        return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested("current")
    results = call()
    return requested("peak") - before, results


def total_bytes(*tensors) -> int:
    return sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("n", [1024, 2048, 4096])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("features", ["", "causal+grouped+dropout", "head_bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_extra_memory(dtype, features, head_dim, n):
    case = make_case(
        features, dtype=dtype, device="cuda", batch=1, seq_q=n, seq_k=n, head_dim=head_dim
    )
    q, k, v, mask = case.inputs
    options = dict(case.options)
    rng_state = options.pop("rng_state", None)
    window = options.get("window", (-1, -1))
    arguments = (options["scale"], *window, 0, options.get("dropout_p", 0.0))
    rows = q[..., 0].numel()

    for _ in range(2):  # first calls set up what stays
        peak, (out, lse) = peak_bytes(
            lambda: ops.attention_forward(q, k, v, mask, rng_state, *arguments)
        )
        extra = peak - total_bytes(out)
    assert extra <= 4 * rows + KIB  # the log-sum-exp

    grad_out = torch.randn_like(out)
    with_mask = mask is not None and mask.is_floating_point()
    for _ in range(2):
        peak, grads = peak_bytes(
            lambda: ops.attention_backward(
                grad_out, q, k, v, mask, rng_state, out, lse, *arguments, [True] * 3 + [with_mask]
            )
        )
        extra = peak - total_bytes(*grads)
    row_stats, dq_sum = 8 * rows, 4 * rows * head_dim  # the log-sum-exp and delta
    mask_sum = 4 * mask.numel() if with_mask else 0
    assert extra <= row_stats + dq_sum + mask_sum + KIB
