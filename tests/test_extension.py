"""The compiled module: what it tells about itself, and what happens where it does not fit."""

import re

import torch
from helpers import in_new_process

import flash_attn_ext
from flash_attn_ext import _C


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", flash_attn_ext.__version__)
    assert _C.build_info()["version"] == flash_attn_ext.__version__


def test_build_info():
    info = _C.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["compiler"] and "flags" in info


def test_built_for_another_torch():
    """Said before the extension is loaded: loading it would fail in the dynamic linker."""
    process = in_new_process(
        "import torch\n"
        "torch.__version__ = '1.2.3'\n"
        "try:\n"
        "    import flash_attn_ext\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert process.returncode == 0, process.stderr
    assert torch.__version__.split("+")[0] in process.stdout
    assert "1.2.3" in process.stdout
    assert "pip install" in process.stdout


def test_torch_with_a_local_version_is_the_same_torch():
    process = in_new_process(
        "import torch\n"
        "torch.__version__ = torch.__version__.split('+')[0] + '+elsewhere'\n"
        "import flash_attn_ext\n"
    )
    assert process.returncode == 0, process.stderr


def test_importing_is_quiet_and_changes_nothing():
    process = in_new_process(
        "import torch\n"
        "before = torch.nn.functional.scaled_dot_product_attention\n"
        "import flash_attn_ext\n"
        "assert torch.nn.functional.scaled_dot_product_attention is before\n"
        "assert torch.backends.mha.get_fastpath_enabled()\n"
    )
    assert process.returncode == 0, process.stderr
    assert not process.stdout


def test_importing_leaves_out_what_is_slow():
    """torch._dynamo takes as long as torch itself; matplotlib is for the notebooks alone."""
    process = in_new_process(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import flash_attn_ext\n"
        "print(*sorted(sys.modules.keys() - before))\n"
    )
    assert process.returncode == 0, process.stderr
    assert "flash_attn_ext" in process.stdout
    assert not re.search(r"torch\._dynamo|matplotlib|numpy", process.stdout)
