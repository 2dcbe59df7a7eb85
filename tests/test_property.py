"""Any call whatever: hypothesis puts shapes, layouts, masks, dtypes and options together."""

import hypothesis.strategies as st
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    Case,
    assert_accurate,
    assert_same_bits,
    draw_rng_state,
    forward_backward,
    kernel_attention,
)
from hypothesis import given, settings

lengths = st.one_of(st.integers(1, 20), st.integers(1, 140))
head_dims = st.one_of(st.sampled_from([8, 16, 32, 64]), st.integers(1, 70))
layouts = st.sampled_from(LAYOUTS)
limits = st.one_of(st.just(-1), st.integers(0, 150))


@st.composite
def cases(draw) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, heads_k, group = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )
    seq_q, seq_k = draw(lengths), draw(lengths)
    head_dim, head_dim_v = draw(head_dims), draw(head_dims)

    def tensor(*shape, dtype=dtype):
        return draw(layouts)(torch.randn(shape, dtype=dtype))

    mask = None
    mask_dtype = draw(st.sampled_from([None, torch.bool, torch.float32, dtype]))
    if mask_dtype is not None:
        sizes = (batch, heads_k * group, seq_q, seq_k)
        shape = [draw(st.sampled_from([1, size])) for size in sizes]
        values = torch.randn(shape)
        mask = draw(layouts)(values > -1 if mask_dtype == torch.bool else values.to(mask_dtype))

    options = {
        "scale": draw(st.sampled_from([1.0, -1.0, 0.0, 0.3])) * head_dim**-0.5,
        "window": (draw(limits), draw(limits)),
        "diagonal_offset": draw(st.integers(-150, 150)),
    }
    if draw(st.booleans()):
        options["dropout_p"] = draw(st.floats(0.01, 0.9))
        options["rng_state"] = draw_rng_state()
    return Case(
        q=tensor(batch, heads_k * group, seq_q, head_dim),
        k=tensor(batch, heads_k, seq_k, head_dim),
        v=tensor(batch, heads_k, seq_k, head_dim_v),
        mask=mask,
        options=options,
    )


@settings(max_examples=300)
@given(case=cases())
def test_accuracy(case):
    assert_accurate(case)


@settings(max_examples=150)
@given(case=cases())
def test_layout_changes_nothing(case):
    attention = case.bind(kernel_attention)
    grad_out = torch.randn_like(attention(*case.inputs))
    copies = [x if x is None else x.contiguous() for x in case.inputs]
    assert_same_bits(
        forward_backward(attention, case.inputs, grad_out),
        forward_backward(attention, copies, grad_out),
    )
