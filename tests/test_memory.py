"""Memory grows with N, not with N x N."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import in_new_process

MEASURE = """
import sys
import torch
from flash_attn_ext import scaled_dot_product_attention
from flash_attn_ext.measure import PeakMemory
from flash_attn_ext.series import tiled

device, case, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)

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

train(64)  # loads libraries
with PeakMemory(device) as memory:
    train(n)
print(memory.bytes)
"""
CASES = ["plain", "causal", "key_mask", "key_bias", "dropout", "grouped", "tiled"]
MIB = 2**20


def peak_memory(device: str, case: str, n: int) -> int:
    """In a process of its own: memory that was freed there serves again unnoticed."""
    process = in_new_process(MEASURE, device, case, n)
    assert process.returncode == 0, process.stderr
    return int(process.stdout)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_linear(case, device):
    n = 2048 if case == "tiled" else 4096
    with ThreadPoolExecutor() as pool:
        once, twice = pool.map(lambda n: peak_memory(device, case, n), (n, 2 * n))
    # q, k, v, out and their gradients are 8 tensors of 2 * n * 64 floats: 16 MiB at n = 4096. The
    # scores of n * n floats would take 64 MiB for each of the two heads, 256 MiB at 2 n.
    assert once < 48 * MIB
    assert twice < 2 * once + 16 * MIB
