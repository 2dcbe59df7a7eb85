"""Turns the newest result of each benchmark into a plot and into a table of a document."""

import itertools
import json
import os
import re
import statistics
from pathlib import Path

import matplotlib
from cell import dims, lengths
from record import RESULTS, ROOT
from tabulate import tabulate

from flash_attn_ext.series.traffic import PAPER, paper_table

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter

IMAGES = ROOT / "docs" / "images"
COLORS = {"sdpa": "tab:blue", "ours": "tab:orange"}
GPU_COLORS = {"flash": "tab:blue", "cudnn": "tab:green", "efficient": "tab:gray"}
PAPER_COLORS = {"naive": "tab:red", **GPU_COLORS, **COLORS}
MASK = {False: "full", True: "causal"}


def origin(record: dict) -> str:
    """Where, with what and when a result was measured: by cell, where a run came in pieces."""
    commits = dict.fromkeys(cell.get("commit", record["commit"]) for cell in record["cells"])
    if "device" in record:
        machine = f"{record['device']}, CUDA {record['cuda']}, cuDNN {record['cudnn']}, "
        machine += f"driver {record['driver']}"
    else:
        machine = f"{record['cpu']} ({record['isa']}), {record['threads']} threads"
    return (
        f"{machine}, torch {record['versions']['torch']}, commit {', '.join(commits)}, "
        f"{record['date'][:10]}"
    )


def cpu_table(record: dict) -> str:
    by_group = {}
    for cell in record["cells"]:
        by_group.setdefault(cell["group"], []).append(cell)
    names = {"flash": "where PyTorch takes its flash kernel", "math": "where it has no such kernel"}
    mean = record["geometric_mean"]
    means = ", ".join(
        f"{mean[f'{peer} forward']:.2f} forward and {mean[f'{peer} backward']:.2f} backward {where}"
        for peer, where in names.items()
        if f"{peer} forward" in mean
    )
    plain = by_group.get("shapes", []) + by_group.get("features", [])
    parts = [
        f"How many times as fast as PyTorch's SDPA, forward / backward (geometric mean {means}), "
        "and how much of the FMA units' peak in the same process:",
        tabulate(
            [
                [
                    "{batch} x {heads} x {length} x {head_dim}".format(**cell),
                    cell["dtype"],
                    cell["feature"],
                    *(
                        " / ".join(form.format(cell[way]) for way in ("forward", "backward"))
                        for form in ("{0[speedup][median]:.2f}", "{0[of_peak]:.0%}")
                    ),
                ]
                for cell in plain
            ],
            ["B x H x N x D", "dtype", "", "times SDPA", "of the peak"],
            "github",
            disable_numparse=True,
        ),
    ]
    for cell in by_group.get("decode", []):
        took = cell["forward"]
        parts.append(
            f"Decoding, {cell['dtype']}, one query for each of {cell['heads']} heads over "
            f"{cell['length_k']} keys of {cell['heads_k']} heads, batch {cell['batch']}: "
            f"{took['speedup']['median']:.2f} times as fast, reading "
            f"{took['ours_gb_s']:.1f} GB/s ({took['of_read']:.0%} of a plain read)."
        )
    for cell in by_group.get("small", []):
        times = [
            " and ".join(
                f"{cell[way][f'{peer}_seconds']['median'] * 1e6:.1f}" for way in ("forward", "both")
            )
            for peer in ("ours", "sdpa")
        ]
        parts.append(
            f"A small call, 1 x 2 x 16 x 64 in {cell['dtype']}, forward alone and with a backward: "
            f"{times[0]} microseconds, SDPA {times[1]}."
        )
    return "\n\n".join([*parts, f"{origin(record)}."])


def against_length(panel) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(FuncFormatter("{:.0f}".format))
    panel.grid(alpha=0.3)


def cpu_plot(record: dict, path: Path) -> None:
    lengths = [cell for cell in record["cells"] if cell["group"] == "lengths"]
    dtypes = list(dict.fromkeys(cell["dtype"] for cell in lengths))
    if not dtypes:
        return
    figure, axes = pyplot.subplots(
        len(dtypes), 2, figsize=(9, 3 * len(dtypes)), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (i, dtype), (j, way) in itertools.product(
        enumerate(dtypes), enumerate(("forward", "backward"))
    ):
        panel = axes[i][j]
        panel.axhline(1, color=COLORS["sdpa"], label="SDPA")
        mine = [cell for cell in lengths if cell["dtype"] == dtype]
        for (d, mask), group in itertools.groupby(mine, lambda c: (c["head_dim"], c["feature"])):
            cells = list(group)
            n = [cell["length"] for cell in cells]
            speedups = [cell[way]["speedup"] for cell in cells]
            style = {
                "color": COLORS["ours"],
                "linestyle": "--" if mask == "causal" else "-",
                "marker": "o" if d == 64 else "s",
                "markersize": 4,
            }
            panel.plot(n, [s["median"] for s in speedups], label=f"d = {d}, {mask}", **style)
            low, high = ([s[quartile] for s in speedups] for quartile in ("p25", "p75"))
            panel.fill_between(n, low, high, color=COLORS["ours"], alpha=0.12, linewidth=0)
        against_length(panel)
        panel.set_title(f"{dtype} {way}")
    axes[0][0].legend(fontsize="small")
    axes[0][0].set_ylim(bottom=0)
    figure.supxlabel("sequence length")
    figure.supylabel("times as fast as SDPA")
    figure.savefig(path, dpi=130)


# What the paper prints, for an A100: 16 texts, 8 heads, d = 64, float16, forward and backward.
A100_MS = {  # table 20: PyTorch, FlashAttention
    512: (1.18, 0.73),
    1024: (3.67, 2.29),
    2048: (13.22, 7.64),
    4096: (50.44, 30.09),
}
A100_MB = {  # table 21
    128: (36, 22),
    256: (104, 44),
    512: (336, 104),
    1024: (1184, 209),
    2048: (4416, 418),
    4096: (17024, 836),
}


def cells_of(record: dict, feature: str) -> list[dict]:
    cells = [cell for cell in record["cells"] if cell["feature"] == feature]
    return sorted(cells, key=lambda cell: cell["length"])


def results(cell: dict) -> dict[str, float]:
    """By peer: milliseconds, or MiB."""
    if "bytes" in cell:
        return {peer: count / 2**20 for peer, count in cell["bytes"].items()}
    return {peer: 1e3 * seconds["median"] for peer, seconds in cell["seconds"].items()}


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def call(cell: dict) -> str:
    mask = ", causal" if cell["causal"] else ""
    dropout = f", dropout {cell['dropout_p']}" if cell["dropout_p"] else ""
    return (
        f"{cell['batch']} x {cell['heads']} heads, d = {cell['head_dim']}, {cell['dtype']}"
        f"{mask}{dropout}"
    )


def right_aligned(rows: list[list[str]], headers: list[str]) -> str:
    align = ["right"] * len(headers)
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=align)


def length_table(what: str, cells: list[dict], a100: dict[int, tuple[float, float]]) -> str:
    peers = [peer for peer in PAPER_COLORS if any(peer in results(cell) for cell in cells)]
    rows = []
    for cell in cells:
        mine, paper = results(cell), a100.get(cell["length"])
        row = [cell["length"], *(number(mine[p]) if p in mine else "" for p in peers)]
        row.append(f"{mine['naive'] / mine['ours']:.1f}" if "naive" in mine else "")
        if a100:
            row += [*(f"{x:,}" for x in paper), f"{paper[0] / paper[1]:.1f}"] if paper else [""] * 3
        rows.append(row)
    headers = ["length", *peers, "naive / ours"]
    if a100:
        headers += ["A100: PyTorch", "A100: FlashAttention", "ratio"]
    return f"{what}, forward and backward ({call(cells[0])}):\n\n{right_aligned(rows, headers)}"


def gpt2_table(cell: dict) -> str:
    counted, ms = paper_table(), results(cell)
    naive, ours = ms["naive"], ms["ours"]
    titles = {"naive": "standard (naive)", "ours": "FlashAttention (ours)", "sdpa": "SDPA"}
    rows = [
        [
            titles[peer],
            *(f"{counted[name][what]:.1f} / {PAPER[name][what]}" for what in ("GFLOP", "GB")),
            PAPER[name]["ms"],
            number(ms.pop(peer)),
        ]
        for name, peer in (("standard", "naive"), ("flash", "ours"))
    ]
    for peer, value in ms.items():
        rows.append([titles.get(peer, f"SDPA's {peer}"), "", "", "", number(value)])
    headers = ["", "GFLOP, counted / paper", "GB, counted / paper", "ms, paper", "ms, here"]
    return (
        f"GPT-2 medium's attention, forward and backward. Counted for the paper's 64 texts, timed "
        f"here with {call(cell)}:\n\n{right_aligned(rows, headers)}\n\n"
        f"Times as fast as the standard: {naive / ours:.1f} here, "
        f"{PAPER['standard']['ms'] / PAPER['flash']['ms']:.1f} in the paper."
    )


def gpt2_summary(record: dict) -> str:
    return f"{gpt2_table(cells_of(record, 'gpt2')[0])}\n\n{origin(record)}."


def memory_table(record: dict) -> str:
    table = length_table("Peak of memory above the inputs, MiB", cells_of(record, "memory"), {})
    return f"{table}\n\n{origin(record)}."


def paper_tables(record: dict) -> str:
    parts = []
    if gpt2 := cells_of(record, "gpt2"):
        parts.append(gpt2_table(gpt2[0]))
    if runtime := cells_of(record, "runtime"):
        parts.append(length_table("Milliseconds", runtime, A100_MS))
    if memory := cells_of(record, "memory"):
        parts.append(length_table("Peak of memory above the inputs, MiB", memory, A100_MB))
    return "\n\n".join([*parts, f"{origin(record)}."])


def paper_plot(record: dict, path: Path) -> None:
    curves = {"ms, forward + backward": "runtime", "peak of memory, MiB": "memory"}
    curves = {label: cells_of(record, feature) for label, feature in curves.items()}
    curves = {label: cells for label, cells in curves.items() if cells}
    gpt2 = cells_of(record, "gpt2")
    count = len(curves) + len(gpt2)
    figure, (panels,) = pyplot.subplots(
        1, count, figsize=(4 * count, 3.2), squeeze=False, layout="constrained"
    )
    for panel, (label, cells) in zip(panels, curves.items()):
        for peer, color in PAPER_COLORS.items():
            points = [(c["length"], results(c)[peer]) for c in cells if peer in results(c)]
            if points:
                panel.plot(*zip(*points), "o-", color=color, label=peer, markersize=4)
        against_length(panel)
        panel.set_yscale("log", base=10)
        panel.yaxis.set_major_formatter(FuncFormatter("{:,g}".format))
        panel.set(xlabel="sequence length", title=f"{label}\n{call(cells[0])}")
        panel.title.set_fontsize("small")
    panels[0].legend(fontsize="small")
    for panel, cell in zip(panels[len(curves) :], gpt2):
        ms = dict(sorted(results(cell).items(), key=lambda item: -item[1]))
        bars = panel.barh(list(ms), list(ms.values()), color=[PAPER_COLORS[peer] for peer in ms])
        panel.bar_label(bars, fmt=lambda ms: f" {number(ms)}")
        panel.margins(x=0.2)
        panel.invert_yaxis()
        panel.set(xlabel="ms", title=f"GPT-2 medium, N = {cell['length']}\n{call(cell)}")
        panel.title.set_fontsize("small")
    figure.savefig(path, dpi=130)


def the_table(record: dict) -> list[dict]:
    """The cells of the table: a run may have measured others, too."""
    plain = {"feature": "plain", "dtype": "bfloat16"}.items()
    return [cell for cell in record["cells"] if plain <= cell.items()]


def gpu_table(record: dict) -> str:
    plain = the_table(record)
    all_lengths = sorted({cell["length"] for cell in plain})
    by_row = {}
    for cell, way in itertools.product(plain, ("forward", "backward")):
        if "hot" in cell.get(way, {}):
            row = by_row.setdefault((cell["head_dim"], cell["causal"], way), {})
            row[cell["length"]] = gpu_entry(cell[way]["hot"], "flash")
    rows = [
        [d, MASK[causal], way, *(row.get(n, "") for n in all_lengths)]
        for (d, causal, way), row in sorted(by_row.items(), key=lambda item: item[0][:2])
    ]
    table = tabulate(rows, ["d", "mask", "pass", *all_lengths], "github", disable_numparse=True)
    means = [
        f"{way} "
        + ", ".join(f"{geometric_mean(plain, way, peer):.2f} of {peer}" for peer in GPU_COLORS)
        for way in ("forward", "backward")
    ]
    return (
        "TFLOP/s of ours on bfloat16, and how many times as fast as SDPA's flash backend "
        "(FlashAttention-2), by sequence length; 16k tokens, hidden size 2048:\n\n"
        f"{table}\n\nGeometric means of the speed: {'; '.join(means)}. {origin(record)}."
    )


def geometric_mean(cells: list[dict], way: str, peer: str) -> float:
    """Of how many times as fast as a peer."""
    timed = [cell[way]["hot"] for cell in cells if "hot" in cell.get(way, {})]
    return statistics.geometric_mean(
        peers[peer]["speedup"]["median"] for peers in timed if peer in peers
    )


def gpu_features(record: dict) -> str:
    others = [
        [feature(cell), cell["bias"] or "", cell["dtype"], dims(cell),
         MASK[cell["causal"]], lengths(cell), way,
         *(gpu_entry(cell[way]["hot"], peer) for peer in GPU_COLORS)]
        for cell in record["cells"]
        if cell["feature"] != "plain"
        for way in ("forward", "backward")
        if "hot" in cell.get(way, {})
    ]  # fmt: skip
    headers = ["feature", "bias", "dtype", "d", "mask", "length", "pass", *GPU_COLORS]
    by_peer = {}
    for result in record["host_us"]:
        row = by_peer.setdefault(result["peer"], {})
        row[result["direction"]] = f"{result['median']:.0f}"
    directions = list(by_peer["ours"])
    host = [[peer, *(row.get(d, "") for d in directions)] for peer, row in by_peer.items()]
    return (
        "TFLOP/s of ours, and how many times as fast as each of SDPA's backends:\n\n"
        f"{tabulate(others, headers, 'github', disable_numparse=True)}\n\n"
        f"{gpu_ways(record)}"
        "Microseconds that the host is busy with a tiny call (1 x 2 x 16 x 64), and with addcmul,\n"
        "for what PyTorch takes by itself. One thread: autograd hands no backward to another.\n\n"
        f"{tabulate(host, ['', *directions], 'github', disable_numparse=True)}\n\n"
        f"{origin(record)}."
    )


def feature(cell: dict) -> str:
    grouped = cell["heads"] != cell["heads_k"]
    return cell["feature"] + (f" {cell['heads']}:{cell['heads_k']}" if grouped else "")


def gpu_ways(record: dict) -> str:
    """How plain calls do when they are not timed hot, or a forward and its backward at once."""
    by_row = {}
    for cell in the_table(record):
        for way, timed in ((way, cell.get(way, {})) for way in ("forward", "backward", "both")):
            for how in timed:
                if (way, how) not in (("forward", "hot"), ("backward", "hot")):
                    row = by_row.setdefault((cell["head_dim"], cell["causal"], way, how), {})
                    row[cell["length"]] = gpu_entry(timed[how], "cudnn")
    if not by_row:
        return ""
    columns = sorted({n for row in by_row.values() for n in row})
    rows = [
        [d, MASK[causal], way, how, *(row.get(n, "") for n in columns)]
        for (d, causal, way, how), row in sorted(by_row.items())
    ]
    headers = ["d", "mask", "pass", "how", *columns]
    return (
        "Plain calls with a rest before each sample (cool) and as replays of a CUDA graph, and how "
        "many times as fast as cuDNN:\n\n"
        f"{tabulate(rows, headers, 'github', disable_numparse=True)}\n\n"
    )


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
                if peer in cell[way].get("hot", {})
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


def train_table(record: dict) -> str:
    rows = []
    for cell in record["cells"]:
        rate, losses = cell["tokens_per_second"], cell["losses"]
        apart = max(abs(a - b) for a, b in zip(losses["sdpa"], losses["ours"], strict=True))
        low, middle, high = (cell["speedup"][name] for name in ("p25", "median", "p75"))
        rows.append(
            [
                f"GPT-2 {cell['model']}",
                f"{cell['batch']} x {cell['length']}",
                *(f"{rate[name]['median']:,.0f}" for name in ("sdpa", "ours")),
                f"{middle:.3f} ({low:.3f} to {high:.3f})",
                len(losses["ours"]),
                *(f"{losses[name][-1]:.4f}" for name in ("sdpa", "ours")),
                f"{apart:.1e}",
            ]
        )
    headers = ["model", "batch", "SDPA, tokens/s", "ours, tokens/s", "times SDPA (quartiles)",
               "steps", "SDPA, last loss", "ours, last loss", "apart at most"]  # fmt: skip
    return f"{right_aligned(rows, headers)}\n\n{origin(record)}."


def train_plot(record: dict, path: Path) -> None:
    cells = record["cells"]
    figure, (panels,) = pyplot.subplots(
        1, len(cells), figsize=(4.5 * len(cells), 3), squeeze=False, layout="constrained"
    )
    for panel, cell in zip(panels, cells):
        for peer, width in (("sdpa", 4), ("ours", 1.2)):
            panel.plot(cell["losses"][peer], color=COLORS[peer], label=peer, linewidth=width)
        panel.set(xlabel="step", ylabel="loss, nats", title=f"GPT-2 {cell['model']}")
        panel.legend()
    figure.savefig(path, dpi=110)


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


SERVER_THREADS = 16  # a CPU with so many in use is told from one with few

REPORTS = (  # benchmark, machine, document, place in it, text, picture or None
    ("cpu", "cpu", "README.md", "cpu", cpu_table, cpu_plot),
    ("gpu", "gpu", "README.md", "gpu", gpu_table, gpu_plot),
    ("gpu", "gpu", "docs/performance.md", "gpu_features", gpu_features, None),
    ("cpu", "server", "docs/performance.md", "cpu_server", cpu_table, None),
    ("paper", "cpu", "README.md", "memory", memory_table, paper_plot),
    ("paper", "gpu", "README.md", "gpt2", gpt2_summary, paper_plot),
    ("paper", "cpu", "docs/paper.md", "paper_cpu", paper_tables, paper_plot),
    ("paper", "gpu", "docs/paper.md", "paper_gpu", paper_tables, paper_plot),
    ("train", "gpu", "docs/paper.md", "train_gpu", train_table, train_plot),
)


def newest_records() -> dict[tuple[str, str], dict]:
    newest = {}
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        machine = "server" if record.get("threads", 0) >= SERVER_THREADS else "cpu"
        key = path.name.split("_")[0], "gpu" if "device" in record else machine
        newest[key] = max(record, newest.get(key, record), key=lambda record: record["date"])
    return newest


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    records = newest_records()
    for benchmark, machine, document, place, text, plot in REPORTS:
        record = records.get((benchmark, machine))
        if not record:
            print(f"no result of {benchmark} on a {machine.upper()} yet")
            continue
        path = ROOT / document
        content = text(record)
        if plot:
            name = benchmark if benchmark == machine else f"{benchmark}_{machine}"
            image = IMAGES / f"benchmark_{name}.png"
            plot(record, image)
            content += f"\n\n![{place} benchmark]({os.path.relpath(image, path.parent)})"
        splice(path, place, content)
        print(f"{document}, {place}: {record['commit']}, {record['date']}")


if __name__ == "__main__":
    main()
