"""The checks of the notebooks accept right answers, and tell what is wrong with wrong ones."""

import pytest
import torch
import torch.nn.functional as F

import flash_attn_ext
from flash_attn_ext.measure import saved_bytes
from flash_attn_ext.series import exercises, naive


def right_online_step(m, l, O, S, V):
    m_new = torch.maximum(m, S.amax(1, keepdim=True))
    P, factor = torch.exp(S - m_new), torch.exp(m - m_new)
    return m_new, l * factor + P.sum(1, keepdim=True), O * factor + P @ V


def online_step_with(l_factor=True, O_factor=True):
    def step(m, l, O, S, V):
        m_new = torch.maximum(m, S.amax(1, keepdim=True))
        P, factor = torch.exp(S - m_new), torch.exp(m - m_new)
        l = (l * factor if l_factor else l) + P.sum(1, keepdim=True)
        return m_new, l, (O * factor if O_factor else O) + P @ V

    return step


def right_merge(m1, l1, m2, l2):
    m = torch.maximum(m1, m2)
    return m, l1 * torch.exp(m1 - m) + l2 * torch.exp(m2 - m)


def attend(q, k, v, **options):
    return naive.attention(q, k, v, scale=q.size(-1) ** -0.5, **options)


def right_merge_outputs(O1, lse1, O2, lse2):
    lse = torch.logaddexp(lse1, lse2)
    return torch.exp(lse1 - lse) * O1 + torch.exp(lse2 - lse) * O2, lse


def merge_outputs_as(merge_O, merge_lse=torch.logaddexp):
    def merge(O1, lse1, O2, lse2):
        lse = merge_lse(lse1, lse2)
        return merge_O(O1, lse1, O2, lse2, lse), lse

    return merge


RIGHT = {
    "score_bytes": lambda b, h, n, element: b * h * n**2 * element,
    "drop_in": lambda q, k, v: flash_attn_ext.scaled_dot_product_attention(q, k, v, is_causal=True),
    "one_query": lambda q, K, V: torch.softmax(K @ q / len(q) ** 0.5, dim=0) @ V,
    "causal_mask": lambda n: torch.arange(n) <= torch.arange(n)[:, None],
    "split_heads": lambda x, heads: x.unflatten(-1, (heads, -1)).transpose(1, 2),
    "product_intensity": lambda m, k, n, e: 2 * m * k * n / ((m * k + k * n + m * n) * e),
    "flash_forward_bytes": lambda n, d, bm, e: (2 + 2 * -(-n // bm)) * n * d * e,
    "smallest_block_m": lambda ridge, element: ridge * element / 2,
    "merge": right_merge,
    "online_step": right_online_step,
    "merge_outputs": right_merge_outputs,
    "softmax_backward": lambda P, dP, O, dO: P * (dP - (dO * O).sum(1, keepdim=True)),
    "can_skip": lambda rows, cols: cols[0] > rows[-1],
}

WRONG = [
    ("score_bytes", lambda b, h, n, element: b * h * n * element, "n squared"),
    ("score_bytes", lambda b, h, n, element: 17, "1470"),
    ("drop_in", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), "is_causal=True"),
    ("drop_in", lambda q, k, v: attend(q, k, v, window=(-1, 0)), "N x N matrix is among"),
    ("one_query", lambda q, K, V: torch.softmax(K @ q, dim=0) @ V, "not divided by sqrt"),
    ("one_query", lambda q, K, V: q, r"shape \[3\], not \[8\]"),
    ("causal_mask", lambda n: torch.ones(n, n).tril(), "should be bool"),
    ("causal_mask", lambda n: torch.ones(n, n, dtype=torch.bool).triu(), "turned round"),
    ("split_heads", lambda x, h: x.view(2, h, 3, 2), "mixes tokens with heads"),
    ("product_intensity", lambda m, k, n, e: 1.0, "2 m k n"),
    ("flash_forward_bytes", lambda n, d, bm, e: 4 * n * d * e, "for every tile of queries"),
    ("flash_forward_bytes", lambda n, d, bm, e: (2 + 2 * (n // bm)) * n * d * e, "round up"),
    ("smallest_block_m", lambda ridge, element: ridge, "element = 4"),
    ("merge", lambda m1, l1, m2, l2: (torch.maximum(m1, m2), l1 + l2), "different maxima"),
    ("merge", lambda m1, l1, m2, l2: (m2, l2 + l1 * torch.exp(m1 - m2)), "wrong the other way"),
    ("merge", lambda m1, l1, m2, l2: (m1, l1), "m should be the larger"),
    ("online_step", online_step_with(l_factor=False), "tile 2 of 3: the old l"),
    ("online_step", online_step_with(O_factor=False), "tile 2 of 3: the old O"),
    ("merge_outputs", merge_outputs_as(lambda O1, a, O2, b, lse: O1 + O2), "come to 2"),
    ("merge_outputs", merge_outputs_as(lambda O1, a, O2, b, lse: (O1 + O2) / 2), "weigh the same"),
    (
        "merge_outputs",
        merge_outputs_as(lambda O1, a, O2, b, lse: O1, lambda a, b: a + b),
        "TIMES",
    ),
    (
        "merge_outputs",
        merge_outputs_as(
            lambda O1, a, O2, b, lse: (a.exp() * O1 + b.exp() * O2) / (a.exp() + b.exp()),
            lambda a, b: torch.log(a.exp() + b.exp()),
        ),
        "overflows",
    ),
    ("softmax_backward", lambda P, dP, O, dO: P * dP, "delta is missing"),
    (
        "softmax_backward",
        lambda P, dP, O, dO: P * (dP - (P * dP).sum(1, keepdim=True)),
        "WHOLE row",
    ),
    ("can_skip", lambda rows, cols: cols[-1] > rows[0], "does see key"),
    ("can_skip", lambda rows, cols: False, "can be skipped"),
]


@pytest.mark.parametrize("name", RIGHT)
def test_right_answer(name, capsys):
    getattr(exercises, name)(RIGHT[name])
    assert f"{name}: right" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_wrong_answer_is_told_what_is_wrong(name, answer, hint):
    with pytest.raises(AssertionError, match=hint):
        getattr(exercises, name)(answer)


@pytest.mark.parametrize("empty", [None, ...], ids=str)
@pytest.mark.parametrize("name", RIGHT)
def test_empty_answer_does_not_stop_a_notebook(name, empty, capsys):
    getattr(exercises, name)(lambda *arguments: empty)
    assert "nothing there yet" in capsys.readouterr().out


def test_saved_bytes():
    x, y = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    assert saved_bytes(lambda: x * y) == 2 * 10 * 10 * 4
    assert saved_bytes(lambda: x * x.detach().T) == 10 * 10 * 4  # one memory
    assert saved_bytes(lambda: x + y) == 0
