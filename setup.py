"""Builds flash_attn_ext._C: the C kernels, each with its own instruction-set flags, the CUDA engine
with the sources of its kernels inside, and the C++ binding. Needs the torch that it will run with
and a C/C++ compiler; no CUDA toolkit, no ninja."""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths
except ImportError as error:
    raise SystemExit(
        f"flash_attn_ext is built against the PyTorch that is installed, but: {error}.\n"
        "Install PyTorch first, then: pip install --no-build-isolation ."
    ) from None

C_FLAGS = "-O3 -std=c11 -fno-math-errno -fvisibility=hidden -Wall -Wextra".split()
# Without -fopenmp at::parallel_for is a plain loop. It is not linked with OpenMP: libtorch_cpu
# brings the one runtime that both shall use.
CXX_FLAGS = "-O2 -std=c++20 -fopenmp -fvisibility=hidden -Wall -g0".split()

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
KERNELS = {str(source): [] for source in [*Path("csrc/cpu").glob("*.c"), "csrc/cpu/isa/generic.c"]}
if platform.machine().lower() in ("x86_64", "amd64"):
    KERNELS |= {
        "csrc/cpu/isa/avx2.c": AVX2,
        "csrc/cpu/isa/avx512.c": AVX512,
        "csrc/cpu/isa/avx512_bf16.c": [*AVX512, "-mavx512bf16"],
        "csrc/cpu/isa/amx_bf16.c": [*AVX512, "-mavx512bf16"],
    }
CUDA_ENGINE = [str(source) for source in Path("csrc/cuda/engine").glob("*.c")]
CUDA_KERNELS = Path("csrc/cuda/kernels")
BINDING = [str(source) for source in Path("csrc/binding").glob("*.cpp")]


class BuildExtension(build_ext):
    """Compiles what is out of date, several files at once, and links as setuptools does."""

    def finalize_options(self):
        super().finalize_options()
        # Kept from build to build (pip would take a fresh directory), apart for each torch.
        self.build_temp = f"build/{sys.implementation.cache_tag}-torch-{torch.__version__}"
        self.force = True  # setuptools would compare times with an extension for another torch

    def build_extension(self, ext):
        # The binding takes longest: it goes first.
        flags = {source: self.binding_flags() for source in BINDING}
        kernels = dict(KERNELS)
        if "csrc/cpu/isa/amx_bf16.c" in kernels and not self.knows("tilerelease"):
            del kernels["csrc/cpu/isa/amx_bf16.c"]
            kernels["csrc/cpu/dispatch.c"] = ["-DFA_NO_AMX"]
        flags |= {source: [*C_FLAGS, *isa_flags] for source, isa_flags in kernels.items()}
        flags |= {source: [*C_FLAGS, "-I."] for source in [*CUDA_ENGINE, self.embed_kernels()]}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = list(pool.map(self.compile, flags.keys(), flags.values()))
        super().build_extension(ext)

    def knows(self, instruction):
        """Whether the compiler's assembler does: one from before 2021 has no AMX."""
        command = [*self.compiler.compiler, "-c", "-x", "c", "-", "-o", os.devnull]
        source = f'void f(void) {{ __asm__("{instruction}"); }}'
        return not subprocess.run(command, input=source.encode(), capture_output=True).returncode

    def binding_flags(self):
        facts = {
            "BUILD_VERSION": self.distribution.get_version(),
            "BUILD_TORCH_VERSION": torch.__version__.split("+")[0],
            "BUILD_C_FLAGS": " ".join(C_FLAGS),
        }
        return [
            *CXX_FLAGS,
            *(f'-D{name}="{value}"' for name, value in facts.items()),
            *(f"-isystem{path}" for path in include_paths()),
            f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}",
        ]

    def embed_kernels(self):
        """Writes the sources of the CUDA kernels into a C file: `fa_cuda_sources` of engine.h."""
        lines = ['#include "csrc/cuda/engine/engine.h"']
        lines.append("const struct fa_cuda_source fa_cuda_sources[] = {")
        for path in sorted(CUDA_KERNELS.rglob("*.*")):
            lines.append(f'{{"{path.relative_to(CUDA_KERNELS).as_posix()}",')
            # A JSON string is a C string here.
            lines += (json.dumps(line) for line in path.read_text().splitlines(keepends=True))
            lines.append("},")
        lines.append("{0, 0}};\n")
        target, text = Path(self.build_temp, "cuda_kernels.c"), "\n".join(lines)
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        return str(target)

    def compile(self, source, flags):
        target = Path(self.build_temp, source).with_suffix(".o")
        headers = [*Path("csrc").glob("*.h"), *Path(source).parents[-3].rglob("*.[hi]*")]
        newest = max(path.stat().st_mtime for path in [Path(source), Path(__file__), *headers])
        if not target.exists() or target.stat().st_mtime < newest:
            self.compiler.compile([source], self.build_temp, extra_postargs=flags)
        return str(target)


setup(
    ext_modules=[
        Extension(
            "flash_attn_ext._C",
            sources=[],  # BuildExtension knows them
            library_dirs=library_paths(),
            libraries=["c10", "torch_cpu", "torch_python", "dl"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
