"""Every instruction set that this machine has, over the sizes where tiles and vectors end."""

import pytest
from helpers import (
    DTYPES,
    assert_accurate,
    in_new_process,
    make_case,
)

from flash_attn_ext import _C

# Around every vector length, register tile and cache block.
HEAD_DIMS = [1, 3, 8, 16, 31, 33, 64, 72, 80, 96, 128, 130, 256]
SHAPES = [  # (seq_q, seq_k), with features that meet their edges there
    (1, 300, ""),
    (2, 1, "bias"),
    (7, 65, "bool_mask+dropout"),
    (63, 64, "causal+wide_v"),
    (64, 127, "bottom_right+grouped"),
    (65, 2, "window+narrow_v"),
    (127, 63, "head_bias+one_kv_head+causal"),
    (129, 129, "window+query_bias+dropout"),
    (300, 7, "key_mask+negative_scale"),
]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(isa, dtype, head_dim):
    heads = 2 if head_dim >= 8 else 16  # the largest of few errors would be a matter of luck
    for seq_q, seq_k, features in SHAPES:
        assert_accurate(
            make_case(
                features, dtype=dtype, batch=1, heads=heads, seq_q=seq_q, seq_k=seq_k,
                head_dim=head_dim,
            )
        )  # fmt: skip


def test_environment_variable_forces_an_isa(isa):
    process = in_new_process(
        "from flash_attn_ext import _C; print(_C.isa())", FLASH_ATTN_EXT_ISA=isa
    )
    assert process.stdout.strip() == isa, process.stderr


def test_environment_variable_with_an_unknown_isa():
    process = in_new_process(
        "import torch, flash_attn_ext\n"
        "x = torch.randn(1, 1, 4, 8)\n"
        "flash_attn_ext.scaled_dot_product_attention(x, x, x)",
        FLASH_ATTN_EXT_ISA="abacus",
    )
    assert process.returncode == 1  # an exception, no signal
    assert "FLASH_ATTN_EXT_ISA" in process.stderr and "unknown" in process.stderr


def test_set_isa_refuses_an_unknown_one():
    before = _C.isa()
    with pytest.raises((RuntimeError, ValueError), match="abacus"):
        _C.set_isa("abacus")
    assert _C.isa() == before


def test_best_isa_first():
    names = [name for name, _ in _C.isa_list()]
    assert names[-1] == "generic"
    assert dict(_C.isa_list())["generic"]
