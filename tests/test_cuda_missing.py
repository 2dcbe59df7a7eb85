"""Without NVRTC, or without a driver: everything still works, on the walkthrough, and says why."""

import re
import subprocess
from pathlib import Path

import pytest
from helpers import TRAIN, in_new_process, needs_cuda

from flash_attn_ext import _C
from flash_attn_ext.warmup import standard_calls

LIBRARIES = {"libnvrtc.so": "there is no NVRTC", "libcuda.so": "there is no NVIDIA driver"}


@pytest.fixture(scope="session")
def hide(tmp_path_factory):
    """in_new_process, where flash_attn_ext does not find libraries of a name."""
    library = tmp_path_factory.mktemp("hide") / "hide.so"
    source = Path(__file__).parent / "c" / "hide.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)

    def run(name, code):
        return in_new_process(code, LD_PRELOAD=str(library), HIDE=name)

    return run


COMPILE = f"from flash_attn_ext import _C; _C.cuda_compile({next(standard_calls())}, 80)"
INFO = "import sys; sys.argv[1:] = ['info']; from flash_attn_ext.__main__ import main; main()"


@pytest.mark.skipif(_C.cuda_info()["nvrtc"] == (0, 0), reason="there is no NVRTC")
def test_compiling_needs_nvrtc_but_no_driver(hide, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_EXT_CACHE", str(tmp_path))
    without_nvrtc = hide("libnvrtc.so", COMPILE)
    assert without_nvrtc.returncode == 1
    assert "pip install nvidia-cuda-nvrtc" in without_nvrtc.stderr
    without_driver = hide("libcuda.so", COMPILE)
    assert without_driver.returncode == 0, without_driver.stderr


@pytest.mark.parametrize(
    ("library", "line"), [("libnvrtc.so", "NVRTC +None"), ("libcuda.so", "driver +None")]
)
def test_info_says_what_is_missing(hide, library, line):
    process = hide(library, INFO)
    assert process.returncode == 0, process.stderr
    assert re.search(line, process.stdout), process.stdout


@needs_cuda
@pytest.mark.parametrize("library", LIBRARIES)
def test_falls_back_with_one_warning(hide, library):
    process = hide(library, TRAIN)
    assert process.returncode == 0, process.stderr
    (warning,) = [line for line in process.stderr.splitlines() if "UserWarning" in line]
    assert LIBRARIES[library] in warning
    assert "tiled" in process.stdout and LIBRARIES[library] in process.stdout


@needs_cuda
@pytest.mark.parametrize("problem", ["cannot be made", "damaged"])
def test_a_bad_cache_costs_time_alone(problem, tmp_path):
    """No directory can be made below a file, not even by root; what is damaged is made again."""
    cache = tmp_path / "cache"
    environment = {"FLASH_ATTN_EXT_CACHE": str(cache)}
    if problem == "cannot be made":
        cache.write_text("")
        environment["FLASH_ATTN_EXT_CACHE"] += "/below"
    else:
        assert in_new_process(TRAIN, **environment).returncode == 0
        for entry in cache.iterdir():
            entry.write_bytes(entry.read_bytes()[:-1000])
        damaged = {entry: entry.stat().st_size for entry in cache.iterdir()}
    process = in_new_process(TRAIN, **environment)
    assert process.returncode == 0, process.stderr
    assert "kernel  cuda" in process.stdout
    warnings = [line for line in process.stderr.splitlines() if "UserWarning" in line]
    if problem == "cannot be made":
        (warning,) = warnings
        assert "FLASH_ATTN_EXT_CACHE" in warning
    else:
        assert not warnings
        assert all(entry.stat().st_size > damaged[entry] for entry in damaged)
