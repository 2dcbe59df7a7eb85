"""The CUDA kernels without a GPU: their results, and that they are the same in every order in which
the threads of a block may run. What the emulator itself finds, it is shown at the end.

On a GPU tests/test_accuracy.py and others say the same of the kernels as they are."""

import pytest
import sanitize
import torch
from emulator import KernelParams, TYPES, emulated, launch, library, tensor_maps
from helpers import (
    EPS,
    assert_accurate,
    assert_same_bits,
    convert,
    forward_backward,
    make_case,
    max_abs,
    naive_attention,
)

# sm_90 has kernels of its own; sm_120 has less shared memory, and so other tiles.
ARCHS = [90, 80, 90, 120, 90]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The rest is small: to wake other threads for it takes longer."""
    threads(1)


def name_of(description) -> str:
    dtype, features, head_dim, (seq_q, seq_k), layout = description
    return f"{features}-{dtype}-{head_dim}-{seq_q}-{seq_k}-{layout.__name__}"


@pytest.mark.parametrize(
    "description,arch",
    [(case, ARCHS[i % len(ARCHS)]) for i, case in enumerate(sanitize.CASES)],
    ids=[name_of(case) for case in sanitize.CASES],
)
def test_accurate(description, arch, seed):
    """What `make sanitize` runs on a GPU; see there."""
    case = sanitize.draw(*description, device="cpu")
    assert_accurate(case, emulated(arch, seed=seed))


# Every tile of forward_sm90.c, and the parts of the kernel that only some calls reach.
@pytest.mark.parametrize(
    "features,sizes",
    [
        ("causal", {"seq_q": 1600, "seq_k": 1500, "head_dim": 64}),
        ("", {"seq_q": 1600, "seq_k": 130, "head_dim": 96}),
        ("", {"seq_q": 1600, "seq_k": 130, "head_dim": 128}),
        ("window", {"seq_q": 300, "seq_k": 500, "head_dim": 128}),
        ("causal", {"seq_q": 200, "seq_k": 300, "head_dim": 192}),
        ("causal+dropout", {"seq_q": 200, "seq_k": 200, "head_dim": 256}),
        ("bias", {"seq_q": 192, "seq_k": 200, "head_dim": 64}),
        ("head_bias", {"seq_q": 130, "seq_k": 264, "head_dim": 128}),
        ("fp32_bias", {"seq_q": 130, "seq_k": 132, "head_dim": 64}),
        ("bool_mask", {"seq_q": 130, "seq_k": 208, "head_dim": 128}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())),
)
def test_forward_of_hopper(features, sizes, seed):
    case = make_case(features, dtype=torch.bfloat16, batch=1, heads=2, **sizes)
    truth = naive_attention(*(convert(x, torch.float64) for x in case.inputs), **case.options)
    ours, standard = case.run(emulated(90, seed=seed)), case.run(naive_attention)
    allowed = max_abs(standard.double() - truth) + EPS[torch.bfloat16] * max_abs(truth)
    assert max_abs(ours.double() - truth) <= allowed


@pytest.mark.parametrize("many_multiprocessors", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("arch", [80, 90])
def test_scores_that_rise(arch, many_multiprocessors, seed):
    """Later keys have larger scores: the maximum that the softmax goes by has to follow."""
    case = make_case(dtype=torch.float16, batch=1, heads=2, seq_q=130, seq_k=300, head_dim=64)
    case.q[..., 0] = 8
    case.k[..., 0] = torch.linspace(200, -200, 300)
    assert_accurate(case, emulated(arch, many_multiprocessors=many_multiprocessors, seed=seed))


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("features", ["causal", "window+dropout", "bias", "query_bias+grouped"])
@pytest.mark.parametrize("arch", [80, 90])
def test_same_bits_in_every_order(arch, features, deterministic, seed):
    """Blocks run one after the other here, so that atomic additions have an order, too."""
    case = make_case(features, dtype=torch.float16, batch=1, heads=2, seq_q=150, seq_k=200)
    grad_out = torch.randn_like(case.q)
    results = [
        forward_backward(
            case.bind(emulated(arch, deterministic=deterministic, seed=order)),
            case.inputs,
            grad_out,
        )
        for order in (0, seed, seed + 1)
    ]
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_every_kernel_was_run():
    for arch in (80, 90):
        for deterministic in (False, True):
            case = make_case("head_bias", dtype=torch.float16, batch=1, heads=2)
            attention = case.bind(emulated(arch, deterministic=deterministic))
            forward_backward(attention, case.inputs, torch.randn_like(case.q))
    missing = sanitize.all_kernels() - set(library().emu_loaded().decode().split())
    assert not missing, f"never run: {missing}"
