"""Many streams, threads, processes and devices at once: the results of one alone."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    TRAIN,
    assert_agree,
    forward_backward,
    in_new_process,
    kernel_attention,
    make_case,
    needs_cuda,
)

pytestmark = needs_cuda

FEATURES = ["", "causal", "grouped+bool_mask", "bias+dropout", "window+wide_v", "key_mask"]


class Job:
    """Forward and backward of one case, again and again."""

    def __init__(self, features: str, device: str = "cuda"):
        self.case = make_case(
            features, dtype=torch.float16, device=device, seq_q=500, seq_k=600, head_dim=64
        )
        self.grad_out = torch.randn_like(self.case.run(kernel_attention))
        self.alone = self()

    def __call__(self):
        attention = self.case.bind(kernel_attention)
        return forward_backward(attention, self.case.inputs, self.grad_out)


def test_streams():
    jobs = [Job(features) for features in FEATURES]
    streams = [torch.cuda.Stream() for _ in jobs]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for job, stream in zip(jobs, streams):
            with torch.cuda.stream(stream):
                results.append((job, job()))
    torch.cuda.synchronize()
    for job, result in results:
        assert_agree(result, job.alone)


@pytest.mark.parametrize("own_streams", [False, True])
def test_threads(own_streams):
    jobs = [Job(features) for features in FEATURES]
    torch.cuda.synchronize()

    def work(job):
        with torch.cuda.stream(torch.cuda.Stream() if own_streams else None):
            results = [job() for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        for result in results:
            assert_agree(result, job.alone)

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(work, jobs))


THREADS_AT_ONCE = """
import threading
from concurrent.futures import ThreadPoolExecutor
import torch
from flash_attn_ext import scaled_dot_product_attention

def inputs(head_dim):
    generator = torch.Generator("cuda").manual_seed(head_dim)
    return [torch.randn(1, 2, 100, head_dim, device="cuda", generator=generator).half()
            for _ in range(3)]

start = threading.Barrier(8)

def work(i):
    q, k, v = inputs(16 if i % 2 else 24)
    start.wait()
    return scaled_dot_product_attention(q, k, v)

with ThreadPoolExecutor(8) as pool:
    outs = list(pool.map(work, range(8)))
for i, out in enumerate(outs):
    q, k, v = inputs(16 if i % 2 else 24)
    expected = torch.softmax(q.float() @ k.float().mT * q.shape[-1] ** -0.5, -1) @ v.float()
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-3)
"""


def test_threads_compile_at_once(tmp_path):
    """Eight of them want two kernels that nobody has."""
    process = in_new_process(THREADS_AT_ONCE, FLASH_ATTN_EXT_CACHE=str(tmp_path / "cache"))
    assert process.returncode == 0, process.stderr
    entries = list((tmp_path / "cache").iterdir())
    assert len(entries) >= 2 and all(entry.suffix == ".cubin" for entry in entries)


def test_two_processes_fill_an_empty_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("FLASH_ATTN_EXT_CACHE", str(cache))
    command = [sys.executable, "-c", TRAIN]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    entries = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(entries) >= 2 and all(path.suffix == ".cubin" for path in entries)

    third = in_new_process(TRAIN)
    assert third.returncode == 0, third.stderr
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == entries  # all were sound


def test_a_thread_that_never_used_the_gpu():
    """It has no CUDA context of its own yet."""
    job = Job("causal")
    with ThreadPoolExecutor(1) as pool:
        assert_agree(pool.submit(job).result(), job.alone)


needs_two_devices = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices"
)


@needs_two_devices
@pytest.mark.parametrize("features", ["causal", "bias+dropout"])
@pytest.mark.parametrize("tensors_on", [0, 1])
@pytest.mark.parametrize("current", [0, 1])
def test_current_device(tensors_on, current, features):
    """The tensors decide where a call runs."""
    job = Job(features, f"cuda:{tensors_on}")
    with torch.cuda.device(current):
        for stream in (None, torch.cuda.Stream(tensors_on)):
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(tensors_on))
            with torch.cuda.stream(stream), torch.cuda.device(current):
                results = job()
                assert torch.cuda.current_device() == current
            torch.cuda.synchronize(tensors_on)
            assert all(x.get_device() == tensors_on for x in results.values())
            assert_agree(results, job.alone)


@needs_two_devices
@pytest.mark.parametrize("kernels", ["best", "portable"])
def test_second_device_alone(kernels):
    """A process that uses the first one for nothing, though it is the current one."""
    process = in_new_process(
        TRAIN.replace('"cuda"', '"cuda:1"'), FLASH_ATTN_EXT_CUDA_KERNELS=kernels
    )
    assert process.returncode == 0, process.stderr


@needs_two_devices
def test_two_devices_at_once():
    jobs = [Job("causal", f"cuda:{device}") for device in (0, 1)]
    results = [(job, job()) for _ in range(10) for job in jobs]
    for job, result in results:
        assert_agree(result, job.alone)
