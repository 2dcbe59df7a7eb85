"""Draws docs/images/tiles.png: what standard attention and FlashAttention keep in slow memory."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Rectangle

N, TILES = 8.0, 8  # side of the N x N matrix, in inches of the drawing, and tiles along it
D = 1.1  # width of Q, K, V and O: the head size
SLOW, FAST, IDLE, EDGE = "#f4b183", "#70ad47", "#f2f2f2", "#555555"


def box(axes, x, y, width, height, color, label="", dashed=False):
    style = {"edgecolor": EDGE, "linewidth": 1, "linestyle": "--" if dashed else "-"}
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, **style))
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=11)


def standard(axes):
    axes.set_title("Standard attention: S and P are N x N, written to memory and read back")
    box(axes, -D - 0.4, 0, D, N, SLOW, "Q\nN x d")
    box(axes, 0, N + 0.4, N, D, SLOW, "Kᵀ   d x N")
    box(axes, 0, 0, N, N, SLOW, "S = Q Kᵀ,  P = softmax(S)\n\nN x N numbers for every head")
    box(axes, N + 0.4, 0, D, N, SLOW, "O\nN x d")


def tiled(axes):
    axes.set_title("FlashAttention: one tile at a time, in cache or on chip")
    step = N / TILES
    row, col = 4, 4  # the tile at work; causal: what lies right of the diagonal is never touched
    top = N - (row + 1) * step
    box(axes, -D - 0.4, 0, D, N, SLOW, "Q\n\n\n\n")  # the lines keep clear of the tile
    box(axes, 0, N + 0.4, N, D, SLOW, "K, V          ")
    box(axes, N + 0.4, 0, D, N, SLOW, "O\n\n\n\n")
    for i in range(TILES):
        for j in range(i + 1):
            box(axes, j * step, N - (i + 1) * step, step, step, IDLE, dashed=True)
    box(axes, -D - 0.4, top, D, step, FAST, "Q tile")
    box(axes, col * step, N + 0.4, step, D, FAST, "K, V\ntile")
    box(axes, col * step, top, step, step, FAST, "S, P\ntile")
    box(axes, N + 0.4, top, D, step, FAST, "O, m, l")
    arrow = {"arrowstyle": "-|>", "color": EDGE, "linewidth": 1.5}
    axes.annotate("", (col * step, top + step / 2), (0, top + step / 2), arrowprops=arrow)
    axes.text(
        (col + 1.3) * step, N - 1.3 * step, "masked tiles:\nskipped", va="center", fontsize=11
    )


figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6.4), layout="constrained")
standard(left)
tiled(right)
for axes in (left, right):
    axes.set(xlim=(-D - 0.6, N + D + 0.6), ylim=(-0.2, N + D + 0.7), aspect="equal")
    axes.axis("off")
figure.legend(
    handles=[Rectangle((0, 0), 1, 1, color=SLOW), Rectangle((0, 0), 1, 1, color=FAST)],
    labels=["in slow memory (DRAM, HBM)", "in fast memory (cache, registers, shared memory)"],
    loc="outside lower center",
    ncols=2,
    frameon=False,
)
figure.savefig(Path(__file__).parent / "images" / "tiles.png", dpi=100)
