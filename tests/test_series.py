"""The walkthroughs in plain PyTorch: they are the tests' oracle, so they are tested first."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    FEATURES,
    NO_LIMIT,
    assert_accurate,
    draw_rng_state,
    forward_backward,
    make_case,
    naive_attention,
)

from flash_attn_ext.series import dropout, naive, online_softmax, tiled


def tiled_attention(q, k, v, mask=None, **options):
    return tiled.attention(q, k, v, mask=mask, **options)


# --- naive -----------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["", "causal", "bool_mask", "bias", "grouped+wide_v"])
def test_naive_is_sdpa(features, device):
    case = make_case(features, dtype=torch.float64, device=device)
    ours = case.run(naive_attention)
    theirs = F.scaled_dot_product_attention(
        case.q, case.k, case.v, case.mask, is_causal="causal" in features, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("window", [(NO_LIMIT, 0), (2, 3), (0, 0), (5, NO_LIMIT)], ids=str)
@pytest.mark.parametrize("diagonal_offset", [-4, 0, 3])
def test_visible_is_the_contract(window, diagonal_offset, device):
    """i + diagonal_offset - window_left <= j <= i + diagonal_offset + window_right."""
    left, right = window
    seen = naive.visible(range(3, 10), range(2, 14), window, diagonal_offset, device)
    for row, i in enumerate(range(3, 10)):
        for col, j in enumerate(range(2, 14)):
            after_left = left < 0 or i + diagonal_offset - left <= j
            before_right = right < 0 or j <= i + diagonal_offset + right
            assert seen[row, col].item() == (after_left and before_right), (i, j)


def test_naive_row_that_attends_to_nothing(device):
    case = make_case("bool_mask", dtype=torch.float64, device=device)
    case.mask[:, :, 4] = False
    results = forward_backward(case.bind(naive_attention), case.inputs, torch.ones_like(case.q))
    assert not results["out"][:, :, 4].any() and not results["dq"][:, :, 4].any()
    assert all(result.isfinite().all() for result in results.values())


# --- online softmax --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_online_softmax(n, offset):
    x = torch.randn(n, dtype=torch.float64) * 5 + offset
    expected = torch.softmax(x, dim=0)
    torch.testing.assert_close(online_softmax.safe_softmax(x), expected)
    torch.testing.assert_close(online_softmax.online_softmax(x), expected)


def test_the_definition_overflows():
    assert online_softmax.softmax(torch.tensor([0.0, 89.0])).isnan().any()
    x = torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(online_softmax.softmax(x), torch.softmax(x, dim=0))


@pytest.mark.parametrize("block_n", [1, 3, 4, 100])
def test_online_softmax_by_blocks(block_n):
    x = torch.randn(6, 18, dtype=torch.float64)
    blocks = online_softmax.online_softmax_blocks(x, block_n)
    torch.testing.assert_close(blocks, torch.softmax(x, dim=1))
    q, k, v = (torch.randn(6, 8).double(), torch.randn(18, 8).double(), torch.randn(18, 5).double())
    out = online_softmax.online_attention(q, k, v, block_n)
    torch.testing.assert_close(out, torch.softmax(q @ k.T, dim=1) @ v)


# --- tiled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", ["", *FEATURES])
def test_tiled_is_naive(feature, dtype, device):
    case = make_case(feature, dtype=dtype, device=device)
    assert_accurate(case, tiled_attention)


@pytest.mark.parametrize("blocks", [(1, 1), (7, 16), (64, 33), (1000, 1000)], ids=str)
def test_tile_size_changes_nothing(blocks, device):
    block_m, block_n = blocks
    case = make_case("causal+bias+dropout+grouped", dtype=torch.float64, device=device)
    q, k, v, mask = case.inputs
    rng_state = case.options.pop("rng_state")
    sizes = {"block_m": block_m, "block_n": block_n}
    out, lse = tiled.forward(q, k, v, mask, rng_state, **case.options, **sizes)
    grads = tiled.backward(
        torch.ones_like(out), q, k, v, mask, rng_state, out, lse,
        **case.options, **sizes, mask_grad=True,
    )  # fmt: skip
    expected = forward_backward(
        lambda *inputs: naive_attention(*inputs, **case.options, rng_state=rng_state),
        case.inputs,
        torch.ones_like(out),
    )
    torch.testing.assert_close([out, *grads], list(expected.values()))


@pytest.mark.parametrize("features", ["", "bias+causal", "grouped+dropout", "wide_v+window"])
def test_tiled_gradcheck(features, device):
    case = make_case(
        features, dtype=torch.float64, device=device,
        batch=1, heads=2, seq_q=3, seq_k=4, head_dim=4,
    )  # fmt: skip
    inputs = [x if x is None else x.requires_grad_() for x in case.inputs]
    assert torch.autograd.gradcheck(case.bind(tiled_attention), inputs)


# --- dropout ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors, philox4x32 with 7 rounds
        ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected, device):
    words = dropout.philox(
        tuple(torch.tensor(word, device=device) for word in counter),
        tuple(torch.tensor(word, device=device) for word in key),
    )
    assert [word.item() for word in words] == expected


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.7, 0.99])
def test_keep_mask_is_the_contract(dropout_p):
    """csrc/dropout.h, spelled out for one element at a time."""
    rng_state, batch, heads = draw_rng_state(), 2, 3
    rows, cols = range(5, 40), range(13, 50)
    kept = dropout.keep_mask(rng_state, dropout_p, batch, heads, rows, cols)
    seed, offset = rng_state.tolist()
    word = 0xFFFFFFFF
    for _ in range(200):
        b, h = torch.randint(batch, ()).item(), torch.randint(heads, ()).item()
        i = torch.randint(rows.start, rows.stop, ()).item()
        j = torch.randint(cols.start, cols.stop, ()).item()
        counter = ((i >> 4) << 3 | (i & 7), (j >> 4) << 2 | (j >> 1 & 3), b * heads + h)
        counter = (*counter, offset & word)
        words = dropout.philox(
            tuple(map(torch.tensor, counter)),
            (torch.tensor(seed & word), torch.tensor(seed >> 32 & word)),
        )
        n = (i >> 3 & 1) * 4 + (j >> 3 & 1) * 2 + (j & 1)
        number, threshold = words[n >> 1].item() >> 16 * (n & 1) & 0x7FFF, round(dropout_p * 32768)
        expected = number >= threshold if dropout_p <= 0.5 else number < 32768 - threshold
        assert kept[b, h, i - rows.start, j - cols.start].item() == expected
