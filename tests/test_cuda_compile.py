"""Every kernel of the standard list compiles for every architecture and keeps to its registers.

Needs NVRTC, no GPU.
"""

import re

import pytest

from flash_attn_ext import _C
from flash_attn_ext.warmup import compile_calls, standard_calls

pytestmark = pytest.mark.skipif(_C.cuda_info()["nvrtc"] == (0, 0), reason="there is no NVRTC")

ARCHS = [80, 86, 89, 90, 100, 120]


@pytest.mark.parametrize("arch", ARCHS)
def test_standard_list(arch, capsys):
    table = {}
    for call, kernels in compile_calls(standard_calls(), arch):
        for kernel in kernels:
            table[describe(call, kernel)] = resources(kernel["log"])
            # C7508 and on: ptxas ignores setmaxnreg, or makes each wgmma wait for the last.
            assert "(C75" not in kernel["log"]
    with capsys.disabled():
        print(f"\nsm_{arch}: registers, bytes of spills, shared memory")
        for row in sorted(table):
            print(f"  {row:100} {table[row][0]:4} {table[row][1]:4}")
    spilling = [row for row, (_, spills) in table.items() if spills]
    assert not spilling


def describe(call, kernel) -> str:
    names = ("window", "dropout", "mask_grad", "mask_broadcasts", "deterministic")
    features = [name for name in names if call[name]]
    if call["mask"]:
        features.append(f"{call['mask']} mask")
    tile = f"{kernel['block_m']}x{kernel['block_n']}x{kernel['threads']}"
    return (
        f"{kernel['file']:20} {call['dtype']:8} {call['head_dim']:3} {tile:12} "
        f"{kernel['shared_bytes']:6} {', '.join(features)}"
    )


def resources(log: str) -> tuple[int, int]:
    """Registers, and bytes of local memory: a spill, or an array that did not fit registers."""
    if "registers" not in log:
        pytest.skip("this NVRTC keeps the report of ptxas to itself")
    (registers,) = re.findall(r"Used (\d+) registers", log)
    (stack,) = re.findall(r"(\d+) bytes stack frame", log)
    return int(registers), int(stack)
