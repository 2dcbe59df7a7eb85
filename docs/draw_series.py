"""Draws the README's pictures of the series: the tiles sweeping, and the bytes that they save."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from flash_attn_ext.series import plots, traffic
from flash_attn_ext.series.traffic import GPT2_MEDIUM

IMAGES = Path(__file__).parent / "images"

plots.use_style()
(IMAGES / "sweep.gif").write_bytes(plots.sweep())

figure, axes = pyplot.subplots(figsize=(8, 2))
counted = {name: traffic(name, **GPT2_MEDIUM) for name in ("standard", "flash")}
plots.traffic_bars(axes, counted)
axes.set_title("attention of GPT-2 medium, 64 texts of 1024 tokens, forward and backward")
figure.savefig(IMAGES / "traffic.png", dpi=100)
