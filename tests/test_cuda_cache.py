"""The directory of compiled CUDA kernels. Needs NVRTC, no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import in_new_process

from flash_attn_ext import _C
from flash_attn_ext.warmup import standard_calls

pytestmark = pytest.mark.skipif(_C.cuda_info()["nvrtc"] == (0, 0), reason="there is no NVRTC")

CALL = next(standard_calls(["float16"], [136]))  # one kernel, however many blocks there are
COMPILE = f"from flash_attn_ext import _C; _C.cuda_compile({CALL}, 80)"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    directory = tmp_path / "a" / "cache"
    monkeypatch.setenv("FLASH_ATTN_EXT_CACHE", str(directory))
    assert _C.cuda_info()["cache"] == str(directory)
    return directory


def compile_it() -> bytes:
    (kernel,) = _C.cuda_compile(CALL, 80)
    assert kernel["file"] == "forward_sm80.cu"
    return kernel["cubin"]


def the_entry(cache: Path) -> Path:
    (entry,) = cache.iterdir()  # and nothing else: no temporary files stay
    return entry


def test_compiles_once(cache):
    cubin = compile_it()
    assert cubin.startswith(b"\x7fELF")
    written = the_entry(cache).stat()
    assert compile_it() == cubin
    assert the_entry(cache).stat() == written


def test_belongs_to_the_user_alone(cache):
    compile_it()
    assert cache.stat().st_mode & 0o777 == 0o700
    assert the_entry(cache).stat().st_mode & 0o777 == 0o600


def test_other_calls_are_other_entries(cache):
    compile_it()
    for other, arch in [({}, 86), ({"head_dim": 24}, 80), ({"window": True}, 80)]:
        _C.cuda_compile(CALL | other, arch)
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"x",
        lambda data: b"something else altogether" * 1000,
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        lambda data: data[:8] + b"\xff" * 16 + data[24:],  # its sizes
    ],
    ids=["empty", "header", "half", "longer", "foreign", "bit", "sizes"],
)
def test_damage_is_repaired(cache, damage):
    cubin = compile_it()
    entry = the_entry(cache)
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    assert compile_it() == cubin
    repaired = the_entry(cache).read_bytes()
    assert len(repaired) == pytest.approx(len(sound), abs=50)  # the log tells how long it took
    assert cubin in repaired


def test_two_processes_fill_it_at_once(cache):
    command = [sys.executable, "-c", COMPILE]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert not errors
    assert compile_it() in the_entry(cache).read_bytes()


def warnings_of(code: str) -> list[str]:
    process = in_new_process(code)
    assert process.returncode == 0, process.stderr
    return [line for line in process.stderr.splitlines() if "UserWarning" in line]


def test_a_directory_that_cannot_be_made_costs_one_warning(cache):
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where a directory should be")
    (warning,) = warnings_of(f"{COMPILE}; _C.cuda_compile({CALL}, 86)")
    assert str(cache) in warning and "FLASH_ATTN_EXT_CACHE" in warning


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_costs_one_warning(cache):
    cache.mkdir(parents=True, mode=0o500)
    (warning,) = warnings_of(f"{COMPILE}; _C.cuda_compile({CALL}, 86)")
    assert str(cache) in warning
    assert not list(cache.iterdir())


def test_a_directory_where_nobody_can_make_files_costs_one_warning(cache, monkeypatch):
    """Not even root."""
    monkeypatch.setenv("FLASH_ATTN_EXT_CACHE", "/proc/self")
    (warning,) = warnings_of(f"{COMPILE}; _C.cuda_compile({CALL}, 86)")
    assert "/proc/self" in warning


def test_a_directory_that_others_can_write_is_not_used(cache):
    """Whoever can put a file there could run code of his in this process."""
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    (warning,) = warnings_of(COMPILE)
    assert "other users" in warning
    assert not list(cache.iterdir())


def test_what_no_kernel_takes(cache):
    with pytest.raises(RuntimeError, match="head size"):
        _C.cuda_compile(CALL | {"head_dim": 257}, 80)
    wide = {"dtype": "float32", "head_dim": 256, "head_dim_v": 256, "backward": True}
    with pytest.raises(RuntimeError, match=r"head size.*256 and 256 do not fit"):
        _C.cuda_compile(CALL | wide, 86)
    with pytest.raises(RuntimeError, match="dtype"):
        _C.cuda_compile(CALL | {"dtype": "float64"}, 80)
    with pytest.raises(RuntimeError, match="compute capability"):
        _C.cuda_compile(CALL, 75)
