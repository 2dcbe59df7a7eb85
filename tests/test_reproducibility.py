"""All threads are used, and the bits are the same every run, however many threads there are."""

import pytest
import torch
from helpers import (
    DTYPES,
    assert_agree,
    assert_same_bits,
    deterministic_algorithms,
    forward_backward,
    in_new_process,
    kernel_attention,
    make_case,
    needs_cuda,
)

FEATURES = ["causal", "bias", "query_bias+dropout", "grouped+wide_v+key_mask"]


def results(case, grad_out=None):
    attention = case.bind(kernel_attention)
    if grad_out is None:
        return {"out": attention(*case.inputs)}
    with deterministic_algorithms():
        return forward_backward(attention, case.inputs, grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_forward_and_backward_repeat(features, dtype, device):
    case = make_case(features, dtype=dtype, device=device, seq_q=200, seq_k=333)
    grad_out = torch.randn_like(results(case)["out"])
    first = results(case, grad_out)
    for _ in range(3):
        assert_same_bits(results(case, grad_out), first)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_thousand_times(head_dim, dtype):
    """A race shows now and then. Whose sums have no fixed order may differ in rounding, no more."""
    case = make_case(
        "causal+bias", dtype=dtype, device="cuda", head_dim=head_dim, seq_q=333, seq_k=400
    )
    out = results(case)["out"]
    grad_out = torch.randn_like(out)
    first = forward_backward(case.bind(kernel_attention), case.inputs, grad_out)
    for _ in range(1000):
        again = forward_backward(case.bind(kernel_attention), case.inputs, grad_out)
        assert_agree(again, first)
        assert torch.equal(again["dk"], first["dk"]) and torch.equal(again["dv"], first["dv"])


@pytest.mark.parametrize(("heads", "seq_q"), [(1, 1), (1, 400), (2, 3), (8, 64)])
@pytest.mark.parametrize("features", ["", "causal", "bias+dropout"])
def test_forward_does_not_depend_on_threads(features, heads, seq_q, threads):
    """Few queries are where one would split the keys among threads."""
    case = make_case(features, batch=1, heads=heads, seq_q=seq_q, seq_k=1500)
    threads(1)
    alone = results(case)
    for count in (2, 3):
        threads(count)
        assert_same_bits(results(case), alone)


@pytest.mark.parametrize("features", FEATURES)
def test_backward_repeats_with_any_number_of_threads(features, threads):
    case = make_case(features, heads=2, batch=1, seq_q=200, seq_k=333)
    grad_out = torch.randn_like(results(case)["out"])
    for count in (1, 2, 3):
        threads(count)
        assert_same_bits(results(case, grad_out), results(case, grad_out))


COUNT_STARTED_THREADS = """
import os, sys
import torch
import flash_attn_ext

ops, options = torch.ops.flash_attn_ext, (0.125, -1, -1, 0, 0.0)
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 1, int(n), 64) for n in sys.argv[2:])
out, lse = ops.attention_forward(q, k, v, None, None, *options)

torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
if sys.argv[1] == "forward":
    ops.attention_forward(q, k, v, None, None, *options)
else:
    ops.attention_backward(out, q, k, v, None, None, out, lse, *options, [True, True, True, False])
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize(
    ("direction", "seq_q", "seq_k"),
    [("forward", 1000, 1000), ("forward", 1, 4000), ("backward", 1000, 1000)],
)
def test_one_head_uses_every_thread(direction, seq_q, seq_k):
    """The threads are started by whoever needs them first: in a new process, by us."""
    process = in_new_process(COUNT_STARTED_THREADS, direction, seq_q, seq_k, seq_k)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) == 2  # and the calling one
