"""Memory grows with N, not with N x N."""

import pytest
from helpers import in_new_process

MEASURE = """
import sys
import torch
from flash_attn_ext import scaled_dot_product_attention
from flash_attn_ext.measure import PeakMemory
from flash_attn_ext.series import tiled

device, case, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(2)

def train(n):
    q, k, v = (torch.randn(1, 2, n, 64, device=device) for _ in range(3))
    key_mask = torch.rand(1, 1, 1, n, device=device) < 0.9
    key_bias = torch.randn(1, 2, 1, n, device=device, requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = {
        "plain": lambda: scaled_dot_product_attention(q, k, v),
        "causal": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "key_mask": lambda: scaled_dot_product_attention(q, k, v, key_mask),
        "key_bias": lambda: scaled_dot_product_attention(q, k, v, key_bias),
        "dropout": lambda: scaled_dot_product_attention(q, k, v, dropout_p=0.1),
        "grouped": lambda: scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
        "tiled": lambda: tiled.attention(q, k, v, mask=key_bias, window=(-1, 0)),
    }[case]()
    out.sum().backward()

train(64)  # loads libraries, starts threads
with PeakMemory(device) as memory:
    train(n)
print(memory.bytes)
"""
CASES = ["plain", "causal", "key_mask", "key_bias", "dropout", "grouped", "tiled"]
N = 4096
MIB = 2**20


def peak_memory(device: str, case: str, n: int) -> int:
    """In a process of its own: memory that was freed there serves again unnoticed."""
    process = in_new_process(MEASURE, device, case, n)
    assert process.returncode == 0, process.stderr
    return int(process.stdout)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_linear(case, device):
    once, twice = (peak_memory(device, case, n) for n in (N, 2 * N))
    # q, k, v, out and their gradients are 8 tensors of 2 * N * 64 floats: 16 MiB. The scores of
    # N x N floats would take 64 MiB for each of the two heads, and four times that at 2 N.
    assert once < 48 * MIB
    assert twice < 2 * once + 16 * MIB
