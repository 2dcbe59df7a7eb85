"""torch.compile(fullgraph=True) on a GPU: forward, backward, and inside CUDA graphs."""

import pytest
import torch
import torch._inductor.config
from helpers import max_abs, needs_cuda

from flash_attn_ext import scaled_dot_product_attention

pytestmark = needs_cuda

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "grouped": {"enable_gqa": True},
    "dropout": {"dropout_p": 0.3, "is_causal": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    # Else compiled code draws other random numbers than eager code.
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


def inputs(dtype, heads_k):
    shapes = (2, 4, 100, 64), (2, heads_k, 100, 64), (2, heads_k, 100, 64)
    return [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the latter: CUDA graphs
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_forward_and_backward(options, dtype, mode):
    leaves = inputs(dtype, heads_k=2 if options == "grouped" else 4)

    def block(q, k, v):
        out = scaled_dot_product_attention(q * 1.5, k, v, **OPTIONS[options])
        return out.transpose(1, 2).flatten(-2).sin()

    def step(function):
        torch.manual_seed(7)
        torch.compiler.cudagraph_mark_step_begin()
        out = function(*leaves)
        return [x.clone() for x in (out, *torch.autograd.grad(out.float().square().sum(), leaves))]

    expected = step(block)
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for _ in range(4):  # a warm-up, a capture, replays
        for ours, theirs in zip(step(compiled), expected, strict=True):
            error = max_abs(ours.float() - theirs.float())
            assert error <= 16 * torch.finfo(dtype).eps * max_abs(theirs)
