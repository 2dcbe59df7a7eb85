"""Dropout: which probabilities are dropped is known, so everything is compared exactly."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    assert_accurate,
    draw_rng_state,
    forward_backward,
    kernel_attention,
    make_case,
)

from flash_attn_ext import scaled_dot_product_attention
from flash_attn_ext.series.dropout import keep_mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 17), (37, 16), (130, 300)])
def test_the_very_same_are_dropped(seq_q, seq_k, dropout_p, dtype, device):
    """With equal scores and the identity for V the output is P itself, dropped and rescaled."""
    q = torch.zeros(2, 3, seq_q, 8, dtype=dtype, device=device)
    k = torch.zeros(2, 3, seq_k, 8, dtype=dtype, device=device)
    v = torch.eye(seq_k, dtype=dtype, device=device).expand(2, 3, -1, -1)
    rng_state = draw_rng_state(device)
    P = kernel_attention(q, k, v, dropout_p=dropout_p, rng_state=rng_state)
    kept = keep_mask(rng_state, dropout_p, 2, 3, range(seq_q), range(seq_k))
    assert torch.equal(P != 0, kept)
    expected = torch.full_like(P, 1 / (seq_k * (1 - dropout_p)))
    torch.testing.assert_close(P[kept], expected[kept])


def test_every_isa_drops_the_same(isa):
    q = torch.zeros(1, 2, 70, 8)
    v = torch.eye(90).expand(1, 2, -1, -1)
    rng_state = draw_rng_state()
    P = kernel_attention(q, q.new_zeros(1, 2, 90, 8), v, dropout_p=0.3, rng_state=rng_state)
    assert torch.equal(P != 0, keep_mask(rng_state, 0.3, 1, 2, range(70), range(90)))


def test_heads_and_batches_drop_differently(device):
    kept = keep_mask(draw_rng_state(device), 0.5, 2, 2, range(64), range(64)).flatten(0, 1)
    for i in range(4):
        for j in range(i):
            agreement = (kept[i] == kept[j]).float().mean()
            assert 0.4 < agreement < 0.6  # 4096 coins: 0.5 +- 0.008


@pytest.mark.parametrize("dropout_p", [0.05, 0.5, 0.51, 0.99])
def test_keep_rate(dropout_p, device):
    kept = keep_mask(draw_rng_state(device), dropout_p, 1, 4, range(512), range(512)).float()
    sigma = (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - (1 - dropout_p)) < 6 * sigma + 2**-15
    # Nor does any row or column of the Philox tiles stand out.
    for dim in (-1, -2):
        rates = kept.mean(dim)
        assert (rates - (1 - dropout_p)).abs().max() < 6 * sigma * (kept.numel() / 512) ** 0.5


@pytest.mark.parametrize("features", ["dropout+causal", "dropout+bias+grouped", "dropout+wide_v"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(features, dtype, device):
    case = make_case(features, dtype=dtype, device=device)
    assert_accurate(case)


# --- through the Python API ------------------------------------------------------------------


def test_manual_seed_governs_it(device):
    case = make_case(device=device)

    def run(seed):
        torch.manual_seed(seed)
        return scaled_dot_product_attention(case.q, case.k, case.v, dropout_p=0.4)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_every_call_draws_anew(device):
    case = make_case(device=device)
    first, second = (
        scaled_dot_product_attention(case.q, case.k, case.v, dropout_p=0.4) for _ in range(2)
    )
    assert not torch.equal(first, second)


def test_no_dropout_draws_nothing(device):
    case = make_case(device=device)
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    scaled_dot_product_attention(case.q, case.k, case.v)
    assert torch.equal(torch.rand(()), expected)


@pytest.mark.parametrize("shape", [(9, 8), (3, 9, 8), (2, 3, 9, 8), (2, 2, 3, 9, 8)], ids=str)
def test_mask_rebuilt_from_the_seed(shape, device):
    """What a call drops can be told from the generator's state before it."""
    q, k, v = (torch.randn(shape, device=device, dtype=torch.float64) for _ in range(3))
    torch.manual_seed(11)
    rng_state = draw_rng_state(device)
    heads = shape[-3] if len(shape) > 2 else 1
    batch = q[..., 0, 0].numel() // heads
    kept = keep_mask(rng_state, 0.25, batch, heads, range(9), range(9)).view(*shape[:-2], 9, 9)

    torch.manual_seed(11)
    out = scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    P = torch.softmax(q @ k.mT / 8**0.5, dim=-1) * kept / 0.75
    torch.testing.assert_close(out, P @ v)


def test_everything_dropped(device):
    case = make_case(device=device)
    grad_out = torch.randn_like(case.q)

    def attention(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, dropout_p=1.0)

    for name, result in forward_backward(attention, case.inputs, grad_out).items():
        assert not result.any(), name


def test_mean_over_many_draws_is_no_dropout(device):
    q, k, v = (torch.randn(1, 1, 8, 16, device=device) for _ in range(3))
    many = [x.expand(4096, -1, -1, -1) for x in (q, k, v)]
    mean = scaled_dot_product_attention(*many, dropout_p=0.2).mean(0, keepdim=True)
    torch.testing.assert_close(mean, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=0.06)
