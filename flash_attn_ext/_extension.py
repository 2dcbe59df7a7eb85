"""Loads the compiled extension, which registers the operators, or says plainly why it cannot.

An extension built for another torch would end in a page of mangled C++ names from the dynamic
linker, or crash later. So what it was built for is read from the file before it is loaded.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import torch

_REBUILD = (
    "In the source directory of flash_attn_ext, run: "
    "pip install --no-build-isolation --no-deps --force-reinstall ."
)


def _load() -> ModuleType:
    spec = importlib.util.find_spec("flash_attn_ext._C")
    if spec is None or spec.origin is None:
        raise ImportError(f"flash_attn_ext is not built for this Python. {_REBUILD}")
    # module.cpp has this text. What follows a "+" (cpu, cu130) does not matter: the binding is
    # linked with none of the CUDA libraries.
    match = re.search(rb"built for torch ([\w.]+)", Path(spec.origin).read_bytes())
    built_for = match[1].decode() if match else "an unknown version"
    if built_for != torch.__version__.split("+")[0]:
        raise ImportError(
            f"flash_attn_ext was built for torch {built_for}, but this is torch "
            f"{torch.__version__}. {_REBUILD}"
        )
    module = importlib.import_module(spec.name)
    if nvrtc := _find_nvrtc():
        module.cuda_set_nvrtc(nvrtc)
    return module


def _find_nvrtc() -> str | None:
    """The NVRTC among the installed packages; if there are several, that of torch's CUDA."""
    spec = importlib.util.find_spec("nvidia")  # a namespace that NVIDIA's packages share
    directories = spec.submodule_search_locations if spec else None
    found = [path for d in directories or () for path in Path(d).glob("*/lib/libnvrtc.so.*")]
    major = (torch.version.cuda or "").split(".")[0]
    return str(max(found, key=lambda path: (path.suffix == f".{major}", path))) if found else None


_load()
