"""explain(): which kernel a call takes, on a CPU and, without a GPU being here, on one."""

import pytest
import torch
from helpers import RecordOps, deterministic_algorithms, in_new_process

import flash_attn_ext
from flash_attn_ext import _C
from flash_attn_ext.explain import _cuda_kernels
from flash_attn_ext.functional import canonicalize


def test_explain_on_the_cpu():
    x = torch.randn(2, 4, 9, 8)
    explanation = flash_attn_ext.explain(x, x, x, is_causal=True)
    assert explanation.kernel == "cpu"
    assert explanation.isa == flash_attn_ext._C.isa()
    assert explanation.isa in str(explanation)


def test_explain_names_the_isa(isa):
    x = torch.randn(2, 4, 9, 8)
    assert flash_attn_ext.explain(x, x, x).isa == isa


def test_explain_where_there_is_no_kernel():
    x = torch.randn(2, 4, 9, 8, device="meta")
    explanation = flash_attn_ext.explain(x, x, x)
    assert explanation.kernel != "cpu"
    assert "meta" in str(explanation)


def test_explain_raises_what_the_call_would():
    x = torch.randn(2, 4, 9, 8)
    with pytest.raises(RuntimeError, match="same dtype"):
        flash_attn_ext.explain(x, x.double(), x)


def test_explain_runs_nothing():
    x = torch.randn(2, 4, 9, 8)
    state = torch.get_rng_state()
    with RecordOps() as record:
        flash_attn_ext.explain(x, x, x, dropout_p=0.5)
    assert not record.used_ours
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def explain_cuda():
    """Explains a call as on a GPU of an architecture, wherever its tensors are."""

    def run(arch, *arguments, **options):
        return _cuda_kernels(canonicalize(*arguments, **options), arch)

    return run


@pytest.fixture
def portable_kernels():
    before = _C.cuda_kernels()
    _C.cuda_set_kernels("portable")
    yield
    _C.cuda_set_kernels(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_portable_kernels_can_be_asked_for(explain_cuda, portable_kernels, dtype):
    x = torch.randn(2, 4, 9, 64, dtype=dtype, requires_grad=True)
    explanation = explain_cuda(90, x, x, x)
    assert explanation.files[0] == "forward_sm80.cu" and "backward_sm80.cu" in explanation.files
    assert "only portable kernels are asked for" in explanation.reason


def test_set_kernels_refuses_an_unknown_name():
    before = _C.cuda_kernels()
    with pytest.raises(ValueError, match="abacus"):
        _C.cuda_set_kernels("abacus")
    assert _C.cuda_kernels() == before


def test_environment_variable_with_unknown_kernels():
    process = in_new_process(
        "from flash_attn_ext import _C\n"
        "from flash_attn_ext.warmup import standard_calls\n"
        "_C.cuda_choice(next(iter(standard_calls())), 90)",
        FLASH_ATTN_EXT_CUDA_KERNELS="abacus",
    )
    assert process.returncode == 1  # an exception, no signal
    assert "FLASH_ATTN_EXT_CUDA_KERNELS=abacus" in process.stderr


def test_explain_names_the_cuda_kernel(explain_cuda):
    x = torch.randn(2, 4, 9, 64, dtype=torch.float16)
    explanation = explain_cuda(90, x, x, x)
    assert explanation.files == ("forward_sm90.cu",)
    assert "cuda (sm_90): forward_sm90.cu" in str(explanation)
    assert "forward_sm90.cu" not in explanation.reason

    explanation = explain_cuda(80, x, x, x)
    assert explanation.files == ("forward_sm80.cu",)
    assert "compute capability 9.0" in explanation.reason

    x = torch.randn(2, 4, 9, 63)
    assert explain_cuda(90, x, x, x).files == ("forward_f32_sm90.cu",)
    assert explain_cuda(80, x, x, x).files == ("forward_sm80.cu",)


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ((2, 4, 9, 192), torch.float32, "head sizes up to 128"),
        ((2, 4, 9, 60), torch.float16, "16 bytes"),
    ],
)
def test_explain_says_why_not_the_kernel_for_hopper(shape, dtype, why, explain_cuda):
    x = torch.randn(shape, dtype=dtype)
    explanation = explain_cuda(90, x, x, x)
    assert explanation.files == ("forward_sm80.cu",)
    assert why in explanation.reason


def test_explain_looks_at_strides_and_addresses(explain_cuda):
    x = torch.randn(2, 4, 9, 72, dtype=torch.float16)
    assert explain_cuda(90, x[..., :64], x[..., :64], x[..., 8:]).files == ("forward_sm90.cu",)
    assert explain_cuda(90, x[..., :64], x[..., :64], x[..., 4:68]).files == ("forward_sm80.cu",)
    x = x.mT  # its rows are not contiguous: copied
    assert explain_cuda(90, x[..., :8], x[..., :8], x[..., :8]).files == ("forward_sm90.cu",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_explain_names_the_kernels_of_the_backward(dtype, explain_cuda):
    x = torch.randn(2, 4, 9, 64, dtype=dtype, requires_grad=True)
    assert explain_cuda(80, x, x, x).files[1:] == (
        "backward_prepare.cu",
        "backward_sm80.cu",
        "backward_convert.cu",
    )
    shapes = {(2, 4, 9, 9): (), (9, 9): ("backward_mask_sm80.cu",)}
    with deterministic_algorithms():
        for shape, extra in shapes.items():
            bias = torch.zeros(shape, dtype=x.dtype, requires_grad=True)
            files = explain_cuda(80, x, x, x, bias).files
            assert files[2:] == ("backward_sm80.cu", "backward_dq_sm80.cu", *extra)


def test_masks_have_the_backward_for_hopper(explain_cuda):
    x = torch.randn(2, 4, 9, 64, dtype=torch.float16, requires_grad=True)
    for mask in (torch.ones(9, 9, dtype=torch.bool), torch.zeros(9, 9, requires_grad=True)):
        explanation = explain_cuda(90, x, x, x, mask)
        assert "backward_sm90.cu" in explanation.files
        assert "backward_sm90.cu" not in explanation.reason
