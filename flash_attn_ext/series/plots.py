"""The pictures of the notebooks, in one style: orange is slow memory, green is fast memory.

Functions that draw into given `axes` take them first. The others return a figure, or a GIF.
"""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle, Wedge
from matplotlib.ticker import FuncFormatter

from .traffic import Traffic

# As in docs/draw_tiles.py.
SLOW, FAST, IDLE, EDGE = "#f4b183", "#70ad47", "#f2f2f2", "#555555"
DONE = "#d5e8c6"  # a tile that has been in fast memory and is gone
KINDS = {
    "product": "#5b8db8",
    "mask": "#c9b458",
    "softmax": "#d9705f",
    "dropout": "#9a7fb5",
    "statistics": "#999999",
}
PEERS = {
    "naive": "#d9705f",
    "standard": "#d9705f",
    "tiled PyTorch": "#c9b458",
    "SDPA": "#5b8db8",
    "ours": FAST,
    "flash": FAST,
}


def use_style() -> None:
    """Small files, no box, a light grid."""
    matplotlib.rcParams.update(
        {
            "figure.dpi": 80,
            "figure.figsize": (7, 3.2),
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": 11,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "axes.prop_cycle": matplotlib.cycler(
                color=[KINDS["product"], KINDS["softmax"], FAST, KINDS["dropout"], KINDS["mask"]]
            ),
            "lines.linewidth": 2,
            "lines.markersize": 5,
        }
    )


def plain(axes: Axes, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    axes.set(xlim=xlim, ylim=ylim, aspect="equal")
    axes.axis("off")


def box(axes: Axes, x, y, width, height, color, label="", *, edge=EDGE, dashed=False, size=9):
    style = {"edgecolor": edge, "linewidth": 0.8, "linestyle": "--" if dashed else "-"}
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, **style))
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=size)


# --- notebook 1 --------------------------------------------------------------------------------


def party(guests: Sequence[int] = (4, 8, 16, 32)) -> Figure:
    """Everybody talks to everybody."""
    figure, panels = pyplot.subplots(1, len(guests), figsize=(2.2 * len(guests), 2.6))
    for axes, n in zip(panels, guests, strict=True):
        seats = [(math.cos(math.tau * i / n), math.sin(math.tau * i / n)) for i in range(n)]
        for i, (x, y) in enumerate(seats):
            for x2, y2 in seats[:i]:
                axes.plot([x, x2], [y, y2], color=SLOW, linewidth=0.6, zorder=1)
        for x, y in seats:
            axes.add_patch(Circle((x, y), 0.09, facecolor=FAST, edgecolor=EDGE, zorder=2))
        axes.set_title(f"{n} guests\n{n * n:,} scores")
        plain(axes, (-1.2, 1.2), (-1.2, 1.2))
    return figure


def pizza(slices: int = 12) -> Figure:
    """Too large for the oven as a whole; a slice fits."""
    figure, (whole, cut) = pyplot.subplots(1, 2, figsize=(8.5, 3))
    for axes in (whole, cut):
        box(axes, 2.2, -0.55, 1.5, 1.1, "#ffffff")
        axes.add_patch(Rectangle((2.32, -0.4), 1.26, 0.7, facecolor=FAST, edgecolor=EDGE))
        axes.text(2.95, 0.42, "oven: fast memory", ha="center", va="center", fontsize=8)
        plain(axes, (-1.25, 3.9), (-1.25, 1.35))
    whole.add_patch(Circle((0, 0), 1.1, facecolor=SLOW, edgecolor=EDGE))
    whole.text(0, 0, "S\nN x N", ha="center", va="center")
    arrow = {"arrowstyle": "-|>", "mutation_scale": 14, "color": EDGE}
    whole.add_patch(FancyArrowPatch((1.2, 0), (2.15, 0), **arrow))
    whole.text(1.66, 0.0, "✗", ha="center", va="center", fontsize=20, color=KINDS["softmax"])
    whole.set_title("It does not fit: every step carries all of it\nto and from the table (HBM)")
    step = 360 / slices
    for i in range(slices):
        away = 0.62 if i == 0 else 0
        angle = (i - 0.5) * step
        color = FAST if i == 0 else DONE if i < 5 else IDLE
        wedge = Wedge((away, 0), 1.1, angle, angle + step, facecolor=color, edgecolor=EDGE)
        cut.add_patch(wedge)
    cut.add_patch(FancyArrowPatch((1.75, 0), (2.3, 0), **arrow))
    cut.set_title("Slice by slice it does: all steps happen\nin the oven, then the slice is gone")
    return figure


def steps_bar(
    axes: Axes, seconds: Mapping[str, Mapping[str, float]], unit: str = "ms", factor: float = 1e3
) -> None:
    """One horizontal bar for each algorithm, in the colours of the kinds of steps."""
    seen = set()
    for name, kinds in seconds.items():
        left = 0.0
        for kind, value in kinds.items():
            label = kind if kind not in seen else None
            seen.add(kind)
            color = KINDS.get(kind, FAST)
            axes.barh(name, value * factor, left=left, color=color, label=label, edgecolor="white")
            left += value * factor
        if unit != "percent":
            axes.text(left, name, f" {left:,.3g}", va="center", fontsize=9)
            axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def against_length(
    axes: Axes,
    lengths: Sequence[int],
    curves: Mapping[str, Sequence[float | None]],
    ylabel: str,
    *,
    base: int = 2,
) -> None:
    """Both axes logarithmic: N^2 is a line of slope 2."""
    for rank, (name, values) in enumerate(curves.items()):
        width = 1.5 + 1.8 * (len(curves) - 1 - rank)  # so that curves that coincide are seen
        points = [(n, v) for n, v in zip(lengths, values, strict=True) if v is not None]
        color = PEERS.get(name)
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=name, linewidth=width)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=base)
    axes.xaxis.set_major_formatter(FuncFormatter("{:.0f}".format))
    axes.yaxis.set_major_formatter(FuncFormatter("{:,g}".format))
    axes.set(xlabel="sequence length N", ylabel=ylabel)
    axes.legend(fontsize=8)


# --- notebook 2 --------------------------------------------------------------------------------


def attention_map(axes: Axes, P, tokens: Sequence[str] = (), title: str = "", vmax=None) -> None:
    """A matrix of probabilities: a row for each query, a column for each key."""
    axes.imshow(P, cmap="Greens", vmin=0, vmax=vmax)
    axes.set_title(title)
    axes.grid(visible=False)
    axes.set_xticks(range(len(tokens)), tokens, rotation=60, fontsize=8)
    axes.set_yticks(range(len(tokens)), tokens, fontsize=8)
    axes.spines[:].set_visible(False)


def one_query(axes: Axes, weights, tokens: Sequence[str], query: int) -> None:
    """Arcs from one query to all keys, as wide as their weights."""
    largest = max(float(w) for w in weights)
    for j, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
        share = float(weight) / largest
        box(axes, j - 0.42, -0.25, 0.84, 0.5, SLOW if j == query else IDLE, token)
        if j != query:
            bend = 0.45 if j < query else -0.45
            arc = FancyArrowPatch(
                (query, 0.27), (j, 0.27), connectionstyle=f"arc3,rad={bend}",
                linewidth=0.3 + 6 * share, color=FAST, alpha=0.25 + 0.75 * share,
            )  # fmt: skip
            axes.add_patch(arc)
        axes.text(j, -0.45, f"{float(weight):.0%}", ha="center", va="center", fontsize=8)
    farthest = max(query, len(tokens) - 1 - query)
    plain(axes, (-0.6, len(tokens) - 0.4), (-0.6, 0.5 + 0.24 * farthest))


# --- notebook 3 --------------------------------------------------------------------------------


def pyramid(axes: Axes, levels: Sequence[tuple[str, str]], title: str = "") -> None:
    """From the fastest and smallest level at the top down; a level is its name and its numbers."""
    count = len(levels)
    for i, (name, numbers) in enumerate(levels):
        top, bottom = count - i, count - i - 0.94
        half = [0.35 + 0.42 * (count - y) for y in (top, bottom)]
        mix = i / max(count - 1, 1)
        color = tuple(
            (1 - mix) * a + mix * b
            for a, b in zip(matplotlib.colors.to_rgb(FAST), matplotlib.colors.to_rgb(SLOW))
        )
        corners = [(-half[0], top), (half[0], top), (half[1], bottom), (-half[1], bottom)]
        axes.add_patch(Polygon(corners, facecolor=color, edgecolor=EDGE))
        axes.text(0, (top + bottom) / 2, name, ha="center", va="center", fontsize=9)
        axes.text(0.5 + 0.42 * count, (top + bottom) / 2, numbers, va="center", fontsize=9)
    axes.set_title(title)
    axes.set(xlim=(-0.5 - 0.42 * count, 1.3 + 1.05 * count), ylim=(-0.1, count + 0.1))
    axes.axis("off")


def bandwidths(
    axes: Axes, sizes: Sequence[int], rates: Sequence[float], caches: Mapping[str, int]
) -> None:
    """bytes/s against the bytes that are read over and over; a line where each cache ends."""
    axes.plot(sizes, [rate / 1e9 for rate in rates], "o-", color=FAST)
    for name, size in caches.items():
        axes.axvline(size, color=EDGE, linestyle=":", linewidth=1)
        axes.text(size, axes.get_ylim()[1], f"{name} ends ", ha="right", va="top", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size_name(x)))
    axes.set(xlabel="size of what is read again and again", ylabel="GB/s", ylim=(0, None))


def size_name(count: float) -> str:
    """A number of bytes as one says it: "32 KiB"."""
    power = min(int(math.log2(max(count, 1)) / 10), 3)
    return f"{count / 1024**power:.0f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def roofline(
    axes: Axes,
    peak_flops: float,
    roofs: Mapping[str, float],
    points: Mapping[str, tuple[float, float, str]],
) -> None:
    """FLOP/s within reach against intensity, and what was reached.

    roofs: bytes/s of each memory. points: intensity, FLOP/s measured, and kind of step.
    """
    low, high = 0.1, 2000.0
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    for (name, bandwidth), color in zip(roofs.items(), (SLOW, FAST)):
        ys = [min(peak_flops, bandwidth * x) / 1e9 for x in xs]
        axes.plot(xs, ys, color=color, label=f"{name}, {bandwidth / 1e9:,.0f} GB/s")
    ridge = peak_flops / min(roofs.values())
    axes.axvline(ridge, color=EDGE, linestyle=":", linewidth=1)
    axes.text(ridge, 1.3 * peak_flops / 1e9, f"{ridge:.1f} FLOP/byte", ha="center", fontsize=8)
    labels = []  # where they begin; of neighbours one below the other, all of them below the roof
    for name, (intensity, reached, kind) in points.items():
        y = reached / 1e9
        axes.plot([intensity], [y], "o", color=KINDS.get(kind, FAST), markersize=7)
        beside = [lowest for x, lowest in labels if max(x / intensity, intensity / x) < 1.5]
        labels.append((intensity, min([y, *beside])))
        place = (7, -11 - 12 * len(beside))
        axes.annotate(
            name, (intensity, labels[-1][1]), place, textcoords="offset points", fontsize=8
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter("{:g}".format))
    axes.yaxis.set_major_formatter(FuncFormatter("{:,g}".format))
    axes.set(xlabel="FLOPs for each byte of slow memory", ylabel="GFLOP/s")
    axes.set_ylim(top=3 * peak_flops / 1e9)
    axes.legend(fontsize=8, loc="lower right")


def traffic_bars(axes: Axes, counted: Mapping[str, Traffic]) -> None:
    """Bytes by kind of step."""
    table = {
        name: {kind: steps.of_kind(kind).bytes for kind in KINDS if steps.of_kind(kind).bytes}
        for name, steps in counted.items()
    }
    steps_bar(axes, table, unit="GB to and from slow memory", factor=1e-9)


# --- notebook 4 --------------------------------------------------------------------------------


def _scene(
    axes: Axes, order: Sequence[tuple[int, int]], moment: int, *, causal: bool, backward: bool,
    size: int,
) -> None:  # fmt: skip
    """One moment of the sweep: which tile is on chip, which have been, what lies in slow memory.

    size: of the letters. The limits are the same for both ways, so that two scenes stand level.
    """
    (row, col), visited = order[moment], set(order[:moment])
    tiles = 1 + max(i for i, _ in order)
    side, gap = 0.95, 0.25
    far = tiles + gap
    for i in range(tiles):
        for j in range(tiles):
            y = tiles - i - 1
            if (i, j) == (row, col):
                box(axes, j, y, 1, 1, FAST, "S, P", size=size)
            elif causal and j > i:
                box(axes, j, y, 1, 1, "#ffffff", edge="#dddddd")
            else:
                color = DONE if (i, j) in visited else IDLE
                box(axes, j, y, 1, 1, color, edge="#bbbbbb", dashed=True)

    def cell(x, y, width, height, label, here, written):
        color = FAST if here else SLOW if written else "#ffffff"
        box(axes, x, y, width, height, color, label if here or written else "", size=size)

    for i in range(tiles):
        y, written = tiles - i - 1, any(i == other for other, _ in visited)
        cell(-side - gap, y, side, 1, "Q\ndO" if backward else "Q", i == row, True)
        cell(far, y, side, 1, "dQ" if backward else "O", i == row, written)
    for j in range(tiles):
        cell(j, far, 1, side, "K\nV", j == col, True)
        if backward:
            written = any(j == other for _, other in visited)
            cell(j, -side - gap, 1, side, "dK\ndV", j == col, written)
    edge = side + gap + 0.1
    plain(axes, (-edge, tiles + edge), (-edge, tiles + edge))


WAYS = {  # of the sweep, whether it is the backward one
    "forward: queries stay on chip, keys pass by": False,
    "backward: keys stay, queries pass by": True,
}


def order_of_tiles(tiles: int, *, causal: bool, backward: bool) -> list[tuple[int, int]]:
    """(row, column) of each tile, in the order of the loops of `tiled`."""
    pairs = [(i, j) for i in range(tiles) for j in range(tiles) if not causal or j <= i]
    return sorted(pairs, key=lambda pair: pair[::-1]) if backward else pairs


def film_strip(moments: int = 5, tiles: int = 4, *, causal: bool = True) -> Figure:
    """Forward above, backward below: a few moments of the sweep."""
    figure = pyplot.figure(figsize=(2 * moments, 4.8))
    for part, (way, backward) in zip(figure.subfigures(2, 1), WAYS.items(), strict=True):
        order = order_of_tiles(tiles, causal=causal, backward=backward)
        part.suptitle(way, fontsize=10)
        for k, axes in enumerate(part.subplots(1, moments)):
            moment = round(k * (len(order) - 1) / (moments - 1))
            _scene(axes, order, moment, causal=causal, backward=backward, size=6)
    return figure


def sweep(tiles: int = 5, *, causal: bool = True, milliseconds: int = 350) -> bytes:
    """A GIF of the tiles sweeping over S, forward on the left and backward on the right."""
    from PIL import Image

    orders = [order_of_tiles(tiles, causal=causal, backward=way) for way in WAYS.values()]
    frames = []
    for moment in range(len(orders[0])):
        figure, panels = pyplot.subplots(1, 2, figsize=(8, 4.3), dpi=70, layout="none")
        figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.05, wspace=0.04)
        for axes, order, (way, backward) in zip(panels, orders, WAYS.items(), strict=True):
            _scene(axes, order, moment, causal=causal, backward=backward, size=8)
            axes.set_title(way, fontsize=10)
        figure.text(
            0.5, 0.015, "green: on chip      orange: in slow memory      S and P are never there",
            ha="center", fontsize=9,
        )  # fmt: skip
        with io.BytesIO() as buffer:
            figure.savefig(buffer, format="png")
            pyplot.close(figure)
            frames.append(Image.open(buffer).convert("RGB"))
    palette = frames[-1].quantize(24)  # one for all frames, or they flicker
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [6 * milliseconds]
    with io.BytesIO() as buffer:
        frames[0].save(
            buffer, format="GIF", save_all=True, append_images=frames[1:], duration=durations,
            loop=0, optimize=True,
        )  # fmt: skip
        return buffer.getvalue()


def running_softmax(axes: Axes, x, m, l, title: str = "") -> None:
    """The numbers, and what online softmax believes about them so far."""
    steps = range(1, len(x) + 1)
    axes.bar(steps, x, color=SLOW, label="$x_j$", width=0.6)
    axes.step(steps, m, where="mid", color=FAST, label="$m$, the maximum so far")
    axes.plot(steps, l, "o--", color=KINDS["softmax"], label="$l$, the sum of $e^{x_j - m}$ so far")
    axes.set(xlabel="numbers seen", title=title, xticks=list(steps))
    axes.legend(fontsize=8)


def ladder(axes: Axes, seconds: Mapping[str, float], base: str) -> None:
    """How many times as fast as `base`, a bar each. A name may say more after a colon."""
    names = list(seconds)
    ratios = [seconds[base] / seconds[name] for name in names]
    shades = [PEERS.get(name.split(":")[0], FAST) for name in names]
    axes.barh(names, ratios, color=shades)
    for name, ratio in zip(names, ratios, strict=True):
        axes.text(
            ratio, name, f" {ratio:.2f}x   {seconds[name] * 1e3:,.1f} ms", va="center", fontsize=9
        )
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as {base}")
    axes.margins(x=0.3)
    axes.grid(axis="y", visible=False)
