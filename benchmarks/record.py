"""What gives a result its meaning later: where, when and with what it was measured."""

import json
import platform
import re
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


def commit() -> str:
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


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


def save(benchmark: str, record: dict, folder: Path) -> None:
    cpu = re.sub(r"\W+", "_", record["cpu"].lower()).strip("_")
    path = folder / f"{benchmark}_{cpu}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
