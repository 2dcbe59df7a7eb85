"""The documents say what the records of the benchmarks say."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def report(monkeypatch):
    for module in ("matplotlib", "tabulate"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield pytest.importorskip("report")
    for name in ("report", "record"):
        sys.modules.pop(name, None)


def test_documents_are_made_from_the_newest_records(report):
    records = report.newest_records()
    assert {key[:2] for key in report.REPORTS} >= records.keys()
    for benchmark, machine, document, place, text, _ in report.REPORTS:
        if (benchmark, machine) not in records:
            continue
        stale = f"{document}, {place}: run benchmarks/report.py"
        assert text(records[benchmark, machine]) in (ROOT / document).read_text(), stale


def test_the_papers_figures_stand_beside_ours(report):
    cell = {
        "feature": "runtime", "dtype": "float16", "batch": 16, "heads": 8, "length": 1024,
        "head_dim": 64, "causal": False, "dropout_p": 0.0,
        "seconds": {name: {"median": s} for name, s in (("ours", 0.001), ("naive", 0.004))},
    }  # fmt: skip
    table = report.length_table("Milliseconds", [cell], report.A100_MS)
    *_, row = table.splitlines()
    assert [x.strip() for x in row.strip("|").split("|")] == [
        "1024", "4", "1", "4.0", "3.67", "2.29", "1.6",
    ]  # fmt: skip
