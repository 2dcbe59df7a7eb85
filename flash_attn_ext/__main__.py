"""python -m flash_attn_ext info | warmup"""

import argparse
import platform
from pathlib import Path

import torch
from tqdm import tqdm

from . import _C, __version__
from .warmup import compile_calls, standard_calls

_DTYPES = ("float16", "bfloat16", "float32")


def info() -> None:
    """What is here, and what would run."""
    build, cuda = _C.build_info(), _C.cuda_info()
    print(f"flash_attn_ext  {__version__}, for torch {build['torch']}, by {build['compiler']}")
    print(f"torch           {torch.__version__}, Python {platform.python_version()}")
    usable = [name for name, here in _C.isa_list() if here]
    print(f"cpu             {_C.isa()} (of {', '.join(usable)}), {torch.get_num_threads()} threads")
    print(f"driver          {_driver(cuda['driver'])}")
    major, minor = cuda["nvrtc"]
    print(f"NVRTC           {f'{major}.{minor}, ' if major else ''}{cuda['nvrtc_path']}")
    for i, (name, arch) in enumerate(cuda["devices"]):
        print(f"cuda:{i}          {name}, sm_{arch}")
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            call = next(standard_calls([dtype], [64]))
            reason = _C.cuda_unsupported(call, i)
            print(f"                {dtype:8} {f'walkthrough: {reason}' if reason else 'kernels'}")
    entries = [path.stat().st_size for path in Path(cuda["cache"]).glob("*.cubin")]
    print(f"cache           {cuda['cache']}: {len(entries)} kernels, {sum(entries) / 1e6:.1f} MB")


def _driver(version: int) -> str:
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if version else "None"


def warmup(archs: list[int], dtypes: list[str], head_dims: list[int]) -> None:
    """Compiles the kernels of the usual calls, so that no later process has to."""
    archs = archs or sorted({arch for _, arch in _C.cuda_info()["devices"]})
    if not archs:
        raise SystemExit("There is no CUDA device here: name architectures, as in --arch 90")
    calls = list(standard_calls(dtypes, head_dims))
    for arch in archs:
        for _ in tqdm(compile_calls(calls, arch), f"sm_{arch}", len(calls), unit="call"):
            pass
    print(f"The kernels are in {_C.cuda_info()['cache']}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flash_attn_ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=info.__doc__).set_defaults(run=info)
    command = commands.add_parser("warmup", help=warmup.__doc__)
    command.add_argument(
        "--arch", type=int, nargs="+", default=[], dest="archs", help="90 for sm_90; default: here"
    )
    command.add_argument("--dtype", nargs="+", default=_DTYPES, choices=_DTYPES, dest="dtypes")
    command.add_argument("--head-dim", type=int, nargs="+", default=[64, 128], dest="head_dims")
    command.set_defaults(run=warmup)
    arguments = vars(parser.parse_args())
    del arguments["command"]
    arguments.pop("run")(**arguments)


if __name__ == "__main__":
    main()
