"""What gives a result its meaning later: where, when and with what it was measured."""

import json
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import flash_attn_ext

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return name[1] if name else platform.processor() or platform.machine()


# A change there is none of the code measured; the benchmarks and the report write some themselves.
NOT_MEASURED = ("benchmarks/results", "docs", "notebooks", "README.md")


def commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changes = git(
        "status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in NOT_MEASURED)
    )
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changes else "")


def facts() -> dict:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "isa": flash_attn_ext.explain(*[torch.empty(1, 1, 1, 64)] * 3).isa,
        "threads": torch.get_num_threads(),
        "versions": {
            "flash_attn_ext": flash_attn_ext.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def cuda_facts() -> dict:
    """Of the GPU, and of what the peers are made of."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = None
    if shutil.which(query[0]):
        done = subprocess.run(query, capture_output=True, text=True)
        driver = done.stdout.split("\n")[0] or None
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def file_name(benchmark: str, machine: str) -> str:
    machine = re.sub(r"\W+", "_", machine.lower()).strip("_")
    return f"{benchmark}_{machine}.json"


def merge(benchmark: str, record: dict, folder: Path, measured: set[str]) -> dict:
    """The record, with the cells that earlier pieces of a run measured and this one did not.

    measured: the names of a cell's results; the rest of it tells it from the others.
    """
    name = file_name(benchmark, machine(record))
    paths = [f / name for f in (folder, RESULTS) if (f / name).exists()]
    if not paths:
        return record

    def key(cell: dict) -> str:
        results = {*measured, "peers", "commit", "date"}
        return json.dumps({k: v for k, v in cell.items() if k not in results}, sort_keys=True)

    old = json.loads(paths[0].read_text())
    cells = {key(cell): cell for cell in old["cells"]}
    for cell in record["cells"]:
        cells[key(cell)] = cells.get(key(cell), {}) | cell
    return old | record | {"cells": list(cells.values())}


def machine(record: dict) -> str:
    return record.get("device", record["cpu"])


def save(benchmark: str, record: dict, folder: Path) -> None:
    path = folder / file_name(benchmark, machine(record))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
