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
GPU_COLORS = {"flash": "tab:blue", "cudnn": "tab:green", "efficient": "tab:gray"}
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


def against_length(panel) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(FuncFormatter("{:.0f}".format))
    panel.grid(alpha=0.3)


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
        against_length(panel)
        panel.set_title(f"{dtype} {way}")
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
    against_length(panel)
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(FuncFormatter("{:,g}".format))
    panel.set(xlabel="sequence length", ylabel="peak memory, MiB")
    panel.legend()
    figure.savefig(path, dpi=130)


def gpu_origin(record: dict) -> str:
    cells = record["cells"]
    commits = ", ".join(dict.fromkeys(cell["commit"] for cell in cells))
    return (
        f"{record['device']}, torch {record['versions']['torch']}, CUDA {record['cuda']}, cuDNN "
        f"{record['cudnn']}, driver {record['driver']}, commit {commits}, {record['date'][:10]}"
    )


def the_table(record: dict) -> list[dict]:
    """The cells of the table: a run may have measured others, too."""
    plain = {"feature": "plain", "dtype": "bfloat16"}.items()
    return [cell for cell in record["cells"] if plain <= cell.items()]


def gpu_table(record: dict) -> str:
    plain = the_table(record)
    lengths = sorted({cell["length"] for cell in plain})
    by_row = {}
    for cell, way in itertools.product(plain, ("forward", "backward")):
        if way in cell:
            row = by_row.setdefault((cell["head_dim"], cell["causal"], way), {})
            row[cell["length"]] = gpu_entry(cell[way]["hot"], "flash")
    rows = [
        [d, MASK[causal], way, *(row.get(n, "") for n in lengths)]
        for (d, causal, way), row in sorted(by_row.items(), key=lambda item: item[0][:2])
    ]
    text = (
        "TFLOP/s of ours on bfloat16, and how many times as fast as SDPA's flash backend "
        "(FlashAttention-2), by sequence length; 16k tokens, hidden size 2048:\n\n"
        + tabulate(rows, ["d", "mask", "pass", *lengths], "github", disable_numparse=True)
    )
    others = [
        [cell["feature"], cell["bias"] or "", cell["dtype"], cell["head_dim"],
         MASK[cell["causal"]], cell["length"], way,
         *(gpu_entry(cell[way]["hot"], peer) for peer in ("naive", *GPU_COLORS))]
        for cell in record["cells"]
        if cell["feature"] != "plain"
        for way in ("forward", "backward", "both")
        if way in cell
    ]  # fmt: skip
    if others:
        headers = ["feature", "bias", "dtype", "d", "mask", "length", "pass", "naive", *GPU_COLORS]
        text += "\n\nOther features, likewise against each of the peers:\n\n"
        text += tabulate(others, headers, "github", disable_numparse=True)
    if "host_us" in record:
        by_peer = {}
        for result in record["host_us"]:
            row = by_peer.setdefault(result["peer"], {})
            row[result["direction"]] = f"{result['median']:.0f}"
        directions = list(by_peer["ours"])
        rows = [[peer, *(row.get(d, "") for d in directions)] for peer, row in by_peer.items()]
        text += "\n\nMicroseconds that the host is busy with a tiny call (1 x 2 x 16 x 64):\n\n"
        text += tabulate(rows, ["", *directions], "github", disable_numparse=True)
    return f"{text}\n\n{gpu_origin(record)}."


def gpu_entry(peers: dict, name: str) -> str:
    if name not in peers:
        return ""
    return f"{peers['ours']['tflops']:.0f} ({peers[name]['speedup']['median']:.2f})"


def gpu_plot(record: dict, path: Path) -> None:
    plain = the_table(record)
    head_dims = sorted({cell["head_dim"] for cell in plain})
    figure, axes = pyplot.subplots(
        len(head_dims), 4, figsize=(12, 2.6 * len(head_dims)), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    columns = list(itertools.product(("forward", "backward"), (False, True)))
    for (i, d), (j, (way, causal)) in itertools.product(enumerate(head_dims), enumerate(columns)):
        panel = axes[i][j]
        cells = sorted(
            (c for c in plain if c["head_dim"] == d and c["causal"] == causal and way in c),
            key=lambda cell: cell["length"],
        )
        for peer, color in (*GPU_COLORS.items(), ("ours", COLORS["ours"])):
            points = [
                (cell["length"], cell[way]["hot"][peer]["tflops"])
                for cell in cells
                if peer in cell[way]["hot"]
            ]
            if points:
                panel.plot(*zip(*points), "o-", color=color, label=peer, markersize=4)
        against_length(panel)
        panel.set_title(f"{way}, {MASK[causal]}, d = {d}")
    axes[0][0].legend(fontsize="small")
    axes[0][0].set_ylim(bottom=0)
    figure.supxlabel("sequence length")
    figure.supylabel("TFLOP/s")
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
        ("gpu", gpu_table, gpu_plot),
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
        print(f"README.md and {image.relative_to(ROOT)}: {record['commit']}, {record['date']}")


if __name__ == "__main__":
    main()
