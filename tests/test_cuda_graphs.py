"""CUDA graphs: what was captured once runs again, on whatever the inputs hold by then."""

import pytest
import torch
from helpers import (
    assert_agree,
    forward_backward,
    in_new_process,
    kernel_attention,
    make_case,
    needs_cuda,
)

import flash_attn_ext

pytestmark = needs_cuda

FEATURES = ["", "causal", "grouped+bool_mask", "bias+dropout", "query_bias+wide_v"]


def capture(function):
    """A graph of the function, and the results that a replay writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def refill(*tensors):
    for x in tensors:
        if x is not None:
            x.random_(0, 2) if x.dtype == torch.bool else x.normal_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_forward(features, dtype):
    case = make_case(features, dtype=dtype, device="cuda", head_dim=64)
    graph, out = capture(lambda: case.run(kernel_attention))
    for _ in range(3):
        refill(*case.inputs)
        out.zero_()
        graph.replay()
        assert torch.equal(out, case.run(kernel_attention))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_forward_and_backward(features, dtype):
    case = make_case(features, dtype=dtype, device="cuda", head_dim=64)
    attention = case.bind(kernel_attention)
    grad_out = torch.randn_like(attention(*case.inputs))
    graph, results = capture(lambda: forward_backward(attention, case.inputs, grad_out))
    for _ in range(3):
        refill(*case.inputs, grad_out)
        if "dropout" in features:
            case.options["rng_state"].random_(0, 2**62)
        graph.replay()
        assert_agree(results, forward_backward(attention, case.inputs, grad_out))


def test_each_replay_drops_others():
    """The state of the generator is drawn on the device, by the graph."""
    case = make_case(device="cuda", dtype=torch.float16, head_dim=64)

    def dropped():
        return flash_attn_ext.scaled_dot_product_attention(case.q, case.k, case.v, dropout_p=0.5)

    graph, out = capture(dropped)
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        for _ in range(2):
            graph.replay()
            seen.append(out.clone())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[4])


CAPTURE_AT_ONCE = """
import torch
from flash_attn_ext import scaled_dot_product_attention

q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.float16)

def capture():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scaled_dot_product_attention(q, q, q, is_causal=True)
    return graph, out

try:
    graph, out = capture()
except RuntimeError as error:
    print(error)
    expected = scaled_dot_product_attention(q, q, q, is_causal=True)  # compiles
    graph, out = capture()
else:
    expected = scaled_dot_product_attention(q, q, q, is_causal=True)
graph.replay()
assert torch.equal(out, expected)
print("good")
"""


def test_nothing_is_compiled_in_a_capture(tmp_path):
    """An error that names what to do, and no damage; from the disk kernels are loaded there."""
    environment = {"FLASH_ATTN_EXT_CACHE": str(tmp_path / "cache")}
    first = in_new_process(CAPTURE_AT_ONCE, **environment)
    assert first.returncode == 0, first.stderr
    *message, good = first.stdout.splitlines()
    assert "python -m flash_attn_ext warmup" in " ".join(message)
    assert "fa_forward" in " ".join(message)
    assert good == "good"

    second = in_new_process(CAPTURE_AT_ONCE, **environment)
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines() == ["good"]
