# %% [markdown]
# # 3. The memory hierarchy
#
# Notebook 1 claimed that attention waits for memory. Here we measure how fast memory is, on the
# machine you are sitting at, count the bytes that each step of attention moves, and end with the
# theorem that says how many bytes FlashAttention saves, evaluated, plotted and compared with the
# count.
#
# ## A kitchen
#
# A cook has a worktop, a fridge, a cellar, and a supermarket at the other end of town. The worktop
# is small and right there; the supermarket has everything and takes half an hour. A good cook does
# not cook faster than others. She goes to the cellar **once**, and does all that there is to do
# with what lies on the worktop before she clears it.
#
# Processors are built like that, all of them, since fast memory has to be small and near. This is
# the pyramid of an A100, with the figures that the FlashAttention paper gives:

# %%
import math
import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import pyplot

import flash_attn_ext
from flash_attn_ext.measure import take_turns
from flash_attn_ext.series import exercises, plots, traffic
from flash_attn_ext.series.traffic import GPT2_MEDIUM, ON_CHIP, block_sizes, paper_table

plots.use_style()
torch.manual_seed(3)

a100 = [
    ("SRAM", "19 TB/s      20 MB on the whole chip"),
    ("HBM", "1.5 TB/s     40 GB"),
    ("CPU's DRAM", "12.8 GB/s    more than 1 TB"),
]
_, axes = pyplot.subplots(figsize=(7, 2.6))
plots.pyramid(axes, a100)
pyplot.show()

# %% [markdown]
# Two words for later. **Slow memory** is where tensors live: HBM on a GPU, DRAM on a CPU. **Fast
# memory** is what the arithmetic can reach at once: on a GPU the registers and the shared memory of
# each multiprocessor, on a CPU its caches. One difference: a CPU's caches fill themselves, while a
# GPU's shared memory is filled by the programmer.
#
# ## Your own pyramid
#
# Your CPU has one, too: caches called L1, L2 and L3, then DRAM. To see it, read the same piece of
# memory over and over, with one thread, and make the piece larger and larger. `expand` gives us a
# tensor whose rows all lie in the same place, so that one call of `sum` reads the piece many times.


# %%
def best_seconds(call):
    return take_turns({"": call}, seconds=0.05, max_rounds=30)[""].best


def read_rate(size):
    """bytes/s, reading `size` bytes again and again."""
    piece = torch.ones(size // 4)
    times = max(1, 2**25 // size)
    again = piece.expand(times, -1)  # [times, size / 4], but no row is a copy
    return times * size / best_seconds(again.sum)


def cache_sizes():
    """What Linux says about the first core: the bytes of L1 (data), L2 and L3."""
    sizes = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = ((cache / name).read_text().strip() for name in ("type", "level"))
        digits = re.match(r"(\d+)K", (cache / "size").read_text())
        if kind != "Instruction" and digits:
            sizes[f"L{level}"] = int(digits[1]) * 1024
    return sizes


threads = torch.get_num_threads()
torch.set_num_threads(1)
caches = cache_sizes()
sizes = [2**k for k in range(12, 29)]
sizes = sorted({*sizes, *(3 * size // 4 for size in sizes)})
sweeps = [[read_rate(size) for size in sizes] for _ in range(3)]
rates = [max(several) for several in zip(*sweeps)]  # whoever disturbs one disturbs another less

_, axes = pyplot.subplots(figsize=(8, 3.2))
plots.bandwidths(axes, sizes, rates, caches)
axes.set_title("this CPU, one thread")
pyplot.show()

# %% [markdown]
# A staircase: a step down wherever the piece outgrows a cache. (Other programs that run at the same
# time blur the steps.) From the plateaus comes the pyramid of your machine:

# %%
borders = list(caches.items()) or [("L1", 2**15), ("L2", 2**20), ("L3", 2**24)]  # else a guess
measured, begin = {}, 0
for name, end in borders:
    inside = [rate for size, rate in zip(sizes, rates) if begin < size <= end]
    measured[name], begin = max(inside, default=math.nan), end
measured["DRAM"] = max(rate for size, rate in zip(sizes, rates) if size >= 2 * sizes[-1] // 4)

levels = [
    (
        name,
        f"{rate / 1e9:5.0f} GB/s"
        + (f"    {plots.size_name(caches[name])}" if name in caches else ""),
    )
    for name, rate in measured.items()
]
_, axes = pyplot.subplots(figsize=(7, 3))
plots.pyramid(axes, levels)
pyplot.show()

# %% [markdown]
# If there is a GPU here, its pyramid is measured in the same way, with a copy instead of a sum:

# %%
if torch.cuda.is_available():
    gpu_sizes = [2**k for k in range(20, 31)]
    gpu_rates = []
    for size in gpu_sizes:
        source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        copy = partial(target.copy_, source)
        sample = take_turns({"": copy}, device="cuda", seconds=0.3, sample_seconds=0.005)
        gpu_rates.append(2 * size / sample[""].best)
    _, axes = pyplot.subplots(figsize=(8, 3))
    plots.bandwidths(axes, gpu_sizes, gpu_rates, {})
    axes.set_title(torch.cuda.get_device_name())
    pyplot.show()
else:
    print("There is no GPU here. The figures of the A100 above serve as an example.")

# %% [markdown]
# ## Arithmetic intensity
#
# How much work does a step have for each byte it fetches? This ratio, FLOPs for each byte, is its
# **arithmetic intensity**. The machine has such a ratio as well: what it can compute, divided by
# what it can fetch, in the same second. A step with less intensity than that leaves the arithmetic
# waiting; it is **memory-bound**. One with more is **compute-bound**, which is what one wants.
#
# A softmax, for instance, reads a number, does about five operations, and writes a number. With two
# bytes a number that is 5 / 4 FLOPs for each byte. An A100 can do 312 TFLOP/s and fetch 1.5 TB/s:
# it would need 200.
#
# ### Exercise 1: the intensity of a product
#
# Take an $[m, k] \times [k, n]$ product whose inputs are read once and whose result is written
# once.


# %%
def my_product_intensity(m, k, n, element):
    # element: bytes of a number
    ...


exercises.product_intensity(my_product_intensity)

# %% [markdown]
# ## The roofline
#
# Both limits in one picture: what is within reach of a step is `min(peak, bandwidth x intensity)`.
# It looks like a roof: a slope where memory is the limit, flat where arithmetic is. The peak is
# measured with a large matrix product, and the dots are the steps of attention, measured here, with
# $S$ too large for the caches.


# %%
def draw_roofline(device, dtype, heads, roofs, on_chip):
    """roofs: bytes/s by memory, the slow one first. on_chip: bytes that the tiles may fill."""
    options = {"device": device, "dtype": dtype}
    n, d, side = 1024, 64, 1024 if device == "cpu" else 8192
    a, b = torch.randn(side, side, **options), torch.randn(side, side, **options)
    q, k, v = (torch.randn(1, heads, n, d, **options) for _ in range(3))
    hidden = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
    S = q @ k.mT
    P = torch.softmax(S, dim=-1)
    minus_infinity = torch.tensor(-torch.inf, **options)
    calls = {
        "peak": lambda: a @ b,
        "S = Q Kᵀ": lambda: torch.matmul(q, k.mT, out=S),
        "mask S": lambda: torch.where(hidden, minus_infinity, S, out=P),
        "P = softmax S": lambda: torch.softmax(S, dim=-1, out=P),
        "O = P V": lambda: P @ v,
        "flash": lambda: flash_attn_ext.scaled_dot_product_attention(q, k, v),
    }
    samples = take_turns(calls, device=device, seconds=5)
    seconds = {name: sample.best for name, sample in samples.items()}

    shape = {"heads": heads, "seq_q": n, "head_dim": d, "element": q.element_size()}
    standard = traffic("standard", **shape, mask=True).forward
    flash = traffic("flash", **shape, on_chip=on_chip).forward
    assert flash.intensity > 5 * standard.intensity
    points = {
        step.name: (step.intensity, step.flops / seconds[step.name], step.kind) for step in standard
    }
    points["all of attention, tiled"] = (flash.intensity, flash.flops / seconds["flash"], "flash")
    _, axes = pyplot.subplots(figsize=(8, 4))
    plots.roofline(axes, 2 * side**3 / seconds["peak"], roofs, points)
    axes.set_title("this CPU, one thread" if device == "cpu" else torch.cuda.get_device_name())
    pyplot.show()


first = borders[0][0]
draw_roofline(
    "cpu",
    torch.float32,
    heads=12,
    roofs={"DRAM": measured["DRAM"], first: measured[first]},
    on_chip=caches.get("L2", 2**20),
)
if torch.cuda.is_available():
    roofs = {"HBM": gpu_rates[-1], "L2": max(gpu_rates)}
    draw_roofline("cuda", torch.float16, heads=256, roofs=roofs, on_chip=ON_CHIP)

# %% [markdown]
# Mask and softmax cling to the slope on the left: no cleverer exponential would help them. The
# green dot is FlashAttention as a whole. It moves so few bytes that it stands far to the right,
# under the flat part of the roof, and nothing but arithmetic limits it.
#
# (Dots below their roof have other troubles: work that is not done in the widest instructions, for
# example; and a CPU reads a line of memory before it writes to it, which nobody has counted here.
# Dots above the orange line got a part of their data from a cache.)
#
# ## Counting bytes
#
# Nobody needs a profiler to know how many bytes the textbook moves. Each step is a kernel of its
# own that reads its inputs and writes its outputs. Here is GPT-2 medium's attention ($N = 1024$, $d
# = 64$, 64 x 16 heads, two bytes a number), forward and backward:

# %%
torch.set_num_threads(threads)
standard = traffic("standard", **GPT2_MEDIUM)
print(standard)

# %% [markdown]
# One pass over the $N \times N$ matrix of all heads is 2.1 GB, and there are eighteen of them. And
# FlashAttention, with a fast memory of 128 KiB:

# %%
flash = traffic("flash", **GPT2_MEDIUM, on_chip=128 * 1024)
print(flash)

# %%
_, axes = pyplot.subplots(figsize=(8, 1.9))
plots.traffic_bars(axes, {"standard": standard, "flash": flash})
pyplot.show()
print("the products' share of the arithmetic:", end=" ")
print(f"{standard.of_kind('product').flops / standard.flops:.0%} of standard attention")

# %% [markdown]
# Mask, softmax and dropout move nothing at all any more: they happen on a tile that is on chip.
#
# The paper prints a table for this very case. Its bytes are the count above. Its FLOPs are
# stranger: the products seem to be those of one head, while everything else is of all sixteen, and
# of what FlashAttention computes twice only the product is in. How one finds out is written in
# `traffic.paper_table`.

# %%
for name, row in paper_table().items():
    print(
        f"{name:9} {row['GB']:5.1f} GB (paper: {row['GB, paper']})   "
        f"{row['GFLOP']:5.1f} GFLOP (paper: {row['GFLOP, paper']}; all: {row['GFLOP, all']:.0f})"
    )

# %% [markdown]
# ## Counting by running
#
# Formulas deserve mistrust. So here is a slow memory that counts: whoever wants rows of a tensor
# has to `load` them, and results have to be `store`d. The forward pass below is the one of notebook
# 4.


# %%
class SlowMemory:
    """Tensors of one head, [N, d] each, that count what is read and written."""

    def __init__(self, **tensors):
        self.tensors, self.bytes = tensors, 0

    def load(self, name, rows):
        part = self.tensors[name][rows]
        self.bytes += part.numel() * part.element_size()
        return part

    def store(self, name, rows, values):
        self.bytes += values.numel() * values.element_size()
        self.tensors[name][rows] = values


def flash_forward(memory, n, block_m, block_n):
    for i in range(0, n, block_m):
        rows = slice(i, i + block_m)
        Q_i = memory.load("Q", rows)
        m = torch.full((len(Q_i), 1), -torch.inf)
        l, O_i = torch.zeros_like(m), torch.zeros_like(Q_i)
        for j in range(0, n, block_n):
            cols = slice(j, j + block_n)
            K_j, V_j = memory.load("K", cols), memory.load("V", cols)
            S = Q_i @ K_j.mT / math.sqrt(Q_i.size(1))
            m_new = torch.maximum(m, S.amax(1, keepdim=True))
            P, rescale = torch.exp(S - m_new), torch.exp(m - m_new)
            l = l * rescale + P.sum(1, keepdim=True)
            O_i = O_i * rescale + P @ V_j
            m = m_new
        memory.store("O", rows, O_i / l)
        memory.store("lse", rows, m + torch.log(l))


n, d = 1000, 64
Q, K, V = (torch.randn(n, d) for _ in range(3))
for block_m, block_n in [(32, 32), (64, 32), (128, 64), (250, 100)]:
    memory = SlowMemory(Q=Q, K=K, V=V, O=torch.empty(n, d), lse=torch.empty(n, 1))
    flash_forward(memory, n, block_m, block_n)
    assert torch.allclose(memory.tensors["O"], F.scaled_dot_product_attention(Q, K, V), atol=1e-5)
    formula = traffic(
        "flash", seq_q=n, head_dim=d, element=4, block_m=block_m, block_n=block_n
    ).forward
    print(
        f"tiles of {block_m:3} x {block_n:3}: {memory.bytes:11,} bytes, formula {formula.bytes:11,}"
    )
    assert memory.bytes == formula.bytes

# %% [markdown]
# Look at which of the two numbers matters: `block_m`, the rows of the tile that *stays*. `block_n`
# does not change a byte.
#
# ### Exercise 2: the formula
#
# Write it yourself for one head, for $Q$, $K$, $V$ and $O$ (leave out `lse`). $n$ need not be a
# multiple of `block_m`.


# %%
def my_flash_forward_bytes(n, d, block_m, element): ...


exercises.flash_forward_bytes(my_flash_forward_bytes)

# %% [markdown]
# ## The theorem
#
# How large can `block_m` be? Four tiles of it ($Q$, $K$, $V$, $O$) have to fit into $M$ numbers of
# fast memory, so it is about $M / 4d$. Then $K$ and $V$ pass by $N / (M / 4d)$ times, which makes
#
# $$\underbrace{2Nd}_{K, V} \cdot \frac{N}{M / 4d} = \frac{8 N^2 d^2}{M}$$
#
# numbers in the forward. In the backward the same happens with four matrices, $Q$, $dO$, and $dQ$
# to and fro: $16 N^2 d^2 / M$. That is **Theorem 2** of the paper, apart from the constants:
#
# > standard attention moves $\Theta(Nd + N^2)$ numbers, FlashAttention $\Theta(N^2 d^2 / M)$.
#
# Since $d^2$ (4,096 for $d = 64$) is many times smaller than $M$ (65,536 numbers in 128 KiB), that
# is many times less. And nobody can do better for all $M$: that is the paper's Proposition 3. Here
# is the count, beside the theorem with its constant of 24:

# %%
n, d = 16_384, 64
on_chip = [2**k for k in range(12, 24)]  # bytes
counted = [traffic("flash", seq_q=n, head_dim=d, on_chip=size).bytes for size in on_chip]
theorem = [24 * n**2 * d**2 / (size / 2) * 2 for size in on_chip]  # M numbers of two bytes
textbook = traffic("standard", seq_q=n, head_dim=d).bytes
least = 13 * n * d * 2  # each matrix once

_, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6))
left.plot(on_chip, [x / 1e9 for x in theorem], "--", color=plots.EDGE, label="24 N²d²/M")
left.plot(on_chip, [x / 1e9 for x in counted], "o", color=plots.FAST, label="flash, counted")
left.axhline(textbook / 1e9, color=plots.KINDS["softmax"], label="standard, counted")
left.axhline(least / 1e9, color=plots.EDGE, linestyle=":", label="every matrix once")
left.set_xscale("log", base=2)
left.set_yscale("log")
left.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:.0f} K")
left.set(xlabel="fast memory, bytes", ylabel="GB moved, one head", title=f"N = {n:,}, d = {d}")
left.legend(fontsize=8)

lengths = [2**k for k in range(8, 17)]
curves = {
    "standard": [traffic("standard", seq_q=x, head_dim=d).bytes / 1e9 for x in lengths],
    "flash": [traffic("flash", seq_q=x, head_dim=d).bytes / 1e9 for x in lengths],
    "every matrix once": [13 * x * d * 2 / 1e9 for x in lengths],
}
plots.against_length(right, lengths, curves, "GB moved, one head", base=10)
right.set_title("128 KiB of fast memory")
pyplot.show()

middle = [c / t for c, t, size in zip(counted, theorem, on_chip) if 2**14 <= size <= 2**18]
print("counted / theorem between 16 KiB and 256 KiB:", ", ".join(f"{x:.2f}" for x in middle))
assert all(0.9 < ratio < 1.3 for ratio in middle)

# %% [markdown]
# On the left: twice the fast memory, half the bytes, until everything fits and there is nothing
# left to save. On the right: FlashAttention is still quadratic in *bytes moved* when $N$ is large.
# It is its *memory* that is linear. The gain is a factor, about $M / d^2$, and it is large because
# that much fast memory sits on every chip.
#
# ### Exercise 3: how large must a tile be?
#
# A machine can do `ridge` FLOPs in the time it takes to fetch a byte. In the forward nearly all
# bytes are those of $K$ and $V$, which pass by once for every `block_m` queries. From which
# `block_m` on is the forward compute-bound?


# %%
def my_smallest_block_m(ridge, element): ...


exercises.smallest_block_m(my_smallest_block_m)

# %%
stays, passes = block_sizes(128 * 1024, head_dim=64)
print(f"128 KiB hold tiles of {stays} rows that stay and {passes} that pass by, for d = 64 in fp16")

# %% [markdown]
# For an A100 the answer is about 200 rows. Kernels get away with 64 or 128, because neighbouring
# tiles of queries read the same keys at about the same time, and then the GPU's L2 cache, a level
# of the pyramid that we have not counted, serves all but the first of them.
#
# **Next:** `4_flash_attention_from_scratch`, where the tiles get their softmax.
#
# ## Solutions


# %%
def solved_product_intensity(m, k, n, element):
    return 2 * m * k * n / ((m * k + k * n + m * n) * element)


exercises.product_intensity(solved_product_intensity)


# %%
def solved_flash_forward_bytes(n, d, block_m, element):
    passes = math.ceil(n / block_m)
    return (2 * n * d + passes * 2 * n * d) * element  # Q and O once, K and V on each pass


exercises.flash_forward_bytes(solved_flash_forward_bytes)


# %%
def solved_smallest_block_m(ridge, element):
    # 4 N^2 d FLOPs for 2 N d * (N / block_m) * element bytes: 2 block_m / element for each byte
    return ridge * element / 2


exercises.smallest_block_m(solved_smallest_block_m)
