"""Every feature: as accurate as standard attention, and differentiated right."""

import pytest
import torch
from helpers import (
    DTYPES,
    FEATURE_PAIRS,
    FEATURES,
    NO_LIMIT,
    assert_accurate,
    convert,
    differentiable,
    kernel_attention,
    make_case,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", ["", *FEATURES])
def test_feature(feature, dtype, device):
    case = make_case(feature, dtype=dtype, device=device)
    assert_accurate(case)


@pytest.mark.parametrize("features", FEATURE_PAIRS)
def test_pair_of_features(features, device):
    case = make_case(features, device=device)
    assert_accurate(case)


@pytest.mark.parametrize("features", ["", *FEATURES, *FEATURE_PAIRS])
def test_gradcheck(features, device):
    case = make_case(
        features, dtype=torch.float64, device=device,
        batch=1, heads=2, seq_q=3, seq_k=4, head_dim=4,
    )  # fmt: skip
    inputs = [convert(x, torch.float64) for x in case.inputs]
    inputs = [x.requires_grad_() if differentiable(x) else x for x in inputs]
    assert torch.autograd.gradcheck(case.bind(kernel_attention), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-3, 30.0])
def test_flat_and_peaked_softmax(magnitude, dtype, device):
    case = make_case("causal", dtype=dtype, device=device)
    case.options["scale"] *= magnitude
    assert_accurate(case)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_scores_far_from_zero(offset, device):
    """exp of them overflows or vanishes; only the maximum taken off first gives the softmax."""
    case = make_case("bias", device=device)
    case.mask += offset
    assert_accurate(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sequences(dtype, device):
    case = make_case(
        "causal", dtype=dtype, device=device, batch=1, heads=1, seq_q=1030, seq_k=1030, head_dim=64
    )
    assert_accurate(case)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "mask", "qk", "kv", "qv"])
def test_gradients_of_some_inputs(wanted, device):
    """Those asked for have the bits they have when all are; the others are not made."""
    case = make_case("bias+causal+dropout", device=device)
    names = ["q", "k", "v", "mask"]
    wanted = [name for name in names if name in wanted or wanted == name]

    def gradients(of):
        leaves = {
            name: x.detach().requires_grad_(name in of) for name, x in zip(names, case.inputs)
        }
        case.bind(kernel_attention)(*leaves.values()).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    everything, some = gradients(names), gradients(wanted)
    for name in names:
        if name in wanted:
            assert torch.equal(some[name], everything[name]), name
        else:
            assert some[name] is None, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp(dtype):
    """The operator's second result: natural log, -inf for a row that attends to nothing."""
    case = make_case("bool_mask+grouped", dtype=dtype)
    case.mask[:, :, 5] = False
    q, k, v, mask = case.inputs
    scale = case.options["scale"]
    _, lse = torch.ops.flash_attn_ext.attention_forward(
        q, k, v, mask, None, scale, NO_LIMIT, 0, 0, 0.0
    )
    assert lse.is_contiguous() and not lse.requires_grad
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    S = scale * q.double() @ k.double().repeat_interleave(2, dim=1).mT
    S = S.masked_fill(~(mask & torch.ones_like(mask).tril()), -torch.inf)
    torch.testing.assert_close(lse.double(), S.logsumexp(-1), rtol=1e-5, atol=1e-5)
