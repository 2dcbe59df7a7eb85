"""Fixtures: a seed that a failure prints, every device, every instruction set."""

import os
import random
import zlib

import hypothesis
import pytest
import torch

from flash_attn_ext import _C

# Without it, PyTorch's matrix products on a GPU refuse torch.use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SEED_VARIABLE = "FLASH_ATTN_EXT_TEST_SEED"

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ISAS = [name for name, usable in _C.isa_list() if usable]

# On a CI machine the same examples every time, elsewhere new ones; a failure prints its blob.
hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "local")


@pytest.fixture(autouse=True)
def seed(request):
    """Seeds every generator: as FLASH_ATTN_EXT_TEST_SEED says, or on a CI machine by the name of
    the test, or else differently each run."""
    by_name = zlib.crc32(request.node.nodeid.encode())
    drawn = by_name if "CI" in os.environ else random.SystemRandom().randrange(2**31)
    value = int(os.environ.get(SEED_VARIABLE, drawn))
    request.node.user_properties.append((SEED_VARIABLE, value))
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    seed = dict(item.user_properties).get(SEED_VARIABLE)
    if report.failed and seed is not None:
        repeat = f"{SEED_VARIABLE}={seed} python -m pytest '{item.nodeid}'"
        report.sections.append(("to repeat it", repeat))
    return report


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=ISAS)
def isa(request):
    """Forces one of the instruction sets that this machine has."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
