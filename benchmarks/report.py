"""Turns the newest result of each benchmark into a plot and into a table of the README."""

import itertools
import json
import re
from pathlib import Path

import matplotlib
from record import RESULTS, ROOT
from tabulate import tabulate

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter

IMAGES = ROOT / "docs" / "images"
COLORS = {"naive": "tab:gray", "sdpa": "tab:blue", "ours": "tab:orange"}
MASK = {False: "full", True: "causal"}


def origin(record: dict) -> str:
    return (
        f"{record['cpu']} ({record['isa']}), {record['threads']} threads, "
        f"torch {record['versions']['torch']}, commit {record['commit']}, {record['date'][:10]}"
    )


def cpu_table(record: dict) -> str:
    groups = itertools.groupby(record["cells"], lambda c: (c["dtype"], c["head_dim"], c["causal"]))
    rows = []
    for (dtype, d, causal), cells in groups:
        speedups = [
            " / ".join(f"{cell[way]['speedup']['median']:.2f}" for way in ("forward", "backward"))
            for cell in cells
        ]
        rows.append([dtype, d, MASK[causal], *speedups])
    lengths = dict.fromkeys(cell["length"] for cell in record["cells"])
    table = tabulate(rows, ["dtype", "d", "mask", *lengths], "github", disable_numparse=True)
    mean = record["geometric_mean"]
    return (
        "How many times as fast as PyTorch's SDPA, forward / backward, by sequence length:\n\n"
        f"{table}\n\n"
        f"Geometric mean: {mean['forward']:.2f} forward, {mean['backward']:.2f} backward. "
        f"{origin(record)}."
    )


def cpu_plot(record: dict, path: Path) -> None:
    dtypes = list(record["matmul_gflops"])
    figure, axes = pyplot.subplots(
        len(dtypes), 2, figsize=(9, 3 * len(dtypes)), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (i, dtype), (j, way) in itertools.product(
        enumerate(dtypes), enumerate(("forward", "backward"))
    ):
        panel = axes[i][j]
        panel.axhline(1, color=COLORS["sdpa"], label="SDPA")
        mine = [cell for cell in record["cells"] if cell["dtype"] == dtype]
        for (d, causal), group in itertools.groupby(mine, lambda c: (c["head_dim"], c["causal"])):
            cells = list(group)
            lengths = [cell["length"] for cell in cells]
            speedups = [cell[way]["speedup"] for cell in cells]
            style = {
                "color": COLORS["ours"],
                "linestyle": "--" if causal else "-",
                "marker": "o" if d == 64 else "s",
                "markersize": 4,
            }
            panel.plot(
                lengths, [s["median"] for s in speedups], label=f"d = {d}, {MASK[causal]}", **style
            )
            panel.fill_between(
                lengths,
                [s["p25"] for s in speedups],
                [s["p75"] for s in speedups],
                color=COLORS["ours"],
                alpha=0.12,
                linewidth=0,
            )
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(FuncFormatter("{:.0f}".format))
        panel.set_title(f"{dtype} {way}")
        panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    axes[0][0].set_ylim(bottom=0)
    figure.supxlabel("sequence length")
    figure.supylabel("times as fast as SDPA")
    figure.savefig(path, dpi=130)


def memory_table(record: dict) -> str:
    by_length = itertools.groupby(record["cells"], lambda cell: cell["length"])
    rows = []
    for length, cells in by_length:
        peak = {cell["peer"]: f"{cell['bytes'] / 2**20:,.0f}" for cell in cells}
        rows.append([length, *(peak.get(peer, "") for peer in COLORS)])
    headers = ["length", "naive", "SDPA", "ours"]
    align = ["right"] * len(headers)
    table = tabulate(rows, headers, "github", disable_numparse=True, colalign=align)
    return (
        "Peak memory in MiB of forward and backward, above the inputs "
        f"(1 x {record['heads']} heads, d = {record['head_dim']}, {record['dtype']}):\n\n"
        f"{table}\n\n{origin(record)}."
    )


def memory_plot(record: dict, path: Path) -> None:
    figure, panel = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    for peer, color in COLORS.items():
        cells = [cell for cell in record["cells"] if cell["peer"] == peer]
        panel.plot(
            [cell["length"] for cell in cells],
            [cell["bytes"] / 2**20 for cell in cells],
            "o-", color=color, label=peer,
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.xaxis.set_major_formatter(FuncFormatter("{:.0f}".format))
    panel.yaxis.set_major_formatter(FuncFormatter("{:,g}".format))
    panel.set(xlabel="sequence length", ylabel="peak memory, MiB")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=130)


def splice(document: Path, name: str, content: str) -> None:
    """Puts content between <!-- benchmark:name --> and <!-- /benchmark:name -->."""
    start, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    text, found = re.subn(
        f"{start}.*?{end}",
        lambda _: f"{start}\n{content}\n{end}",
        document.read_text(),
        flags=re.DOTALL,
    )
    if found != 1:
        raise SystemExit(f"{document} has no single pair of markers {start} ... {end}")
    document.write_text(text)


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, table, plot in (
        ("cpu", cpu_table, cpu_plot),
        ("memory", memory_table, memory_plot),
    ):
        records = [json.loads(path.read_text()) for path in RESULTS.glob(f"{name}_*.json")]
        if not records:
            print(f"no result of {name} yet")
            continue
        record = max(records, key=lambda record: record["date"])
        image = IMAGES / f"benchmark_{name}.png"
        plot(record, image)
        picture = f"![{name} benchmark]({image.relative_to(ROOT)})"
        splice(ROOT / "README.md", name, f"{table(record)}\n\n{picture}")
        print(f"README.md and {image.relative_to(ROOT)}: {origin(record)}")


if __name__ == "__main__":
    main()
