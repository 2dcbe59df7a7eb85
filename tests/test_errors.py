"""Bad input raises an exception that names the argument, in PyTorch's words where it has some."""

import random
import re

import pytest
import torch
import torch.nn.functional as F

from flash_attn_ext import scaled_dot_product_attention

X = torch.randn(2, 4, 6, 8)


def heads(number: int) -> torch.Tensor:
    return X[:, :1].expand(-1, number, -1, -1)


def mask(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


# Arguments that PyTorch refuses in words of its own. Ours are the same words.
AS_IN_PYTORCH = {
    "query_none": ((None, X, X), {}),
    "key_none": ((X, None, X), {}),
    "value_number": ((X, X, 3.0), {}),
    "query_list": (([1.0], X, X), {}),
    "dtypes": ((X, X.double(), X), {}),
    "dtypes_half": ((X.half(), X.bfloat16(), X), {}),
    "devices": ((X, X.to("meta"), X), {}),
    "query_1d": ((X[0, 0, 0], X, X), {}),
    "value_0d": ((X, X, torch.tensor(1.0)), {}),
    "mask_list": ((X, X, X, [1]), {}),
    "mask_int64": ((X, X, X, mask(6, 6, dtype=torch.int64)), {}),
    "mask_float64": ((X, X, X, mask(6, 6, dtype=torch.float64)), {}),
    "mask_other_half": ((X.half(), X.half(), X.half(), mask(6, 6, dtype=torch.bfloat16)), {}),
    "dropout_too_large": ((X, X, X), {"dropout_p": 1.5}),
    "dropout_string": ((X, X, X), {"dropout_p": "a"}),
    "dropout_none": ((X, X, X), {"dropout_p": None}),
    "is_causal_none": ((X, X, X), {"is_causal": None}),
    "is_causal_int": ((X, X, X), {"is_causal": 1}),
    "scale_string": ((X, X, X), {"scale": "1"}),
    "enable_gqa_string": ((X, X, X), {"enable_gqa": "yes"}),
}

# Arguments that PyTorch refuses from somewhere inside, or computes something with.
IN_OUR_WORDS = {
    "causal_and_mask": ((X, X, X, mask(6, 6)), {"is_causal": True}, "attn_mask.*is_causal"),
    "head_sizes": ((X, X[..., :7], X), {}, r"query.*key.*8.*7"),
    "lengths": ((X, X, X[..., :5, :]), {}, r"key.*value.*6.*5"),
    "batches": ((X, X[:1].expand(3, -1, -1, -1), X), {}, r"query|key|value"),
    "head_numbers": ((X, heads(2), heads(2)), {}, r"heads|enable_gqa|broadcast"),
    "key_heads_do_not_divide": ((X, heads(3), heads(3)), {"enable_gqa": True}, "heads in key"),
    "value_heads_do_not_divide": ((X, heads(2), heads(3)), {"enable_gqa": True}, "heads in key"),
    "more_key_heads": ((X, heads(8), heads(8)), {"enable_gqa": True}, "heads in key"),
    "integers": ((X.long(), X.long(), X.long()), {}, "dtype"),
    "bools": ((X.bool(), X.bool(), X.bool()), {}, "dtype"),
    "complex": ((X.cfloat(), X.cfloat(), X.cfloat()), {}, "dtype"),
    "sparse": ((X.to_sparse(), X, X), {}, "query|parse"),
    "mask_shape": ((X, X, X, mask(5, 6)), {}, r"attn_mask.*5, 6"),
    "mask_too_many_dims": ((X, X, X, mask(1, 1, 1, 6, 6)), {}, "attn_mask"),
    "mask_larger_batch": ((X[:1], X[:1], X[:1], mask(3, 1, 6, 6)), {}, "attn_mask"),
    "mask_more_heads": ((heads(1), heads(1), heads(1), mask(3, 6, 6)), {}, "attn_mask"),
    "mask_device": ((X, X, X, mask(6, 6, device="meta")), {}, "attn_mask.*device"),
    "dropout_negative": ((X, X, X), {"dropout_p": -0.1}, "dropout probability.*-0.1"),
    "dropout_nan": ((X, X, X), {"dropout_p": float("nan")}, "dropout probability.*nan"),
}


def error_of(attention, args, options) -> Exception:
    with pytest.raises(Exception) as caught:
        attention(*args, **options)
    return caught.value


@pytest.mark.parametrize(("args", "options"), AS_IN_PYTORCH.values(), ids=AS_IN_PYTORCH)
def test_in_the_words_of_pytorch(args, options):
    ours = error_of(scaled_dot_product_attention, args, options)
    theirs = error_of(F.scaled_dot_product_attention, args, options)
    assert type(ours) is type(theirs)
    # A function in Python does not know whether an argument was given by position or by name.
    assert str(ours) == re.sub(r" \(position \d\)", "", str(theirs))


@pytest.mark.parametrize(("args", "options", "words"), IN_OUR_WORDS.values(), ids=IN_OUR_WORDS)
def test_in_our_words(args, options, words):
    error = error_of(scaled_dot_product_attention, args, options)
    assert isinstance(error, (RuntimeError, NotImplementedError))
    assert re.search(words, str(error), re.DOTALL), str(error)


@pytest.mark.parametrize(
    ("args", "options"),
    [((X, X), {}), ((X, X, X), {"foo": 1}), ((X, X, X, None, 0.0, False, 1.0), {})],
    ids=["missing", "unknown", "scale_by_position"],
)
def test_signature(args, options):
    for attention in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        assert isinstance(error_of(attention, args, options), TypeError)


def random_argument():
    dtypes = [torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]
    shape = random.choices([0, 1, 2, 3, 8], k=random.randrange(6))
    tensor = torch.ones(shape, dtype=random.choice(dtypes), device=random.choice(["cpu", "meta"]))
    fitting = X[..., : random.randint(6, 8)]
    return random.choice(
        [None, -1, 3, "x", b"", 0.5, float("nan"), float("inf"), 2**70, True, [], {}, object(),
         torch.float32, tensor, tensor, tensor, tensor.mT if tensor.dim() > 1 else tensor,
         X, X, X, X.double(), fitting, X[:, :2], X[0], X.expand(2, 2, 4, 6, 8)]
    )  # fmt: skip


EXPECTED = (TypeError, RuntimeError, ValueError, NotImplementedError, IndexError, OverflowError)


def test_no_argument_crashes_the_function():
    for _ in range(3000):
        args = [random_argument() for _ in range(3)]
        names = random.sample(
            ["attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"], random.randrange(3)
        )
        try:
            scaled_dot_product_attention(*args, **{name: random_argument() for name in names})
        except EXPECTED as error:
            assert str(error)


def test_no_argument_crashes_the_operators():
    """Called past the Python API they have to look after themselves."""
    ops = torch.ops.flash_attn_ext
    q, k, v = X, X[:, :2], X[:, :2, :, :5]
    rng_state = torch.tensor([1, 2])
    forward = [q, k, v, mask(1, 4, 6, 1), rng_state, 0.3, -1, 0, 0, 0.5]
    out, lse = ops.attention_forward(*forward)
    backward = [torch.ones_like(out), *forward[:5], out, lse, *forward[5:], [True] * 4]
    ops.attention_backward(*backward)
    for operator, good in ((ops.attention_forward, forward), (ops.attention_backward, backward)):
        for _ in range(3000):
            args = list(good)
            for position in random.sample(range(len(args)), random.choice([1, 1, 2])):
                args[position] = random_argument()
            try:
                operator(*args)
            except EXPECTED as error:
                assert str(error)


@pytest.mark.parametrize("number", [2**62, -(2**62), 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("name", ["window_left", "window_right", "diagonal_offset"])
def test_numbers_without_measure(name, number):
    """They overflow nothing: each means what it says, or is refused."""
    options = {"window_left": -1, "window_right": -1, "diagonal_offset": 0, name: number}
    try:
        out, _ = torch.ops.flash_attn_ext.attention_forward(
            X, X, X, None, None, 0.3, *options.values(), 0.0
        )
    except RuntimeError as error:
        assert name in str(error)
    else:
        everything = scaled_dot_product_attention(X, X, X, scale=0.3)
        torch.testing.assert_close(out, everything)
