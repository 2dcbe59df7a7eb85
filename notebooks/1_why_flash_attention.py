# %% [markdown]
# # 1. Why FlashAttention?
#
# A language model that has read a whole book, a model of an hour of audio, of a genome: all of them
# need **long sequences**, and what stands in their way is attention. This notebook shows why, on
# the machine that you are sitting at, and then makes the problem go away with three lines. The
# notebooks after it explain how.
#
# You should know PyTorch. You need not know anything about GPUs, nor have one.

# %%
import os

import torch
import torch.nn.functional as F
from matplotlib import pyplot

import flash_attn_ext
from flash_attn_ext.measure import saved_bytes, take_turns
from flash_attn_ext.series import exercises, naive, plots, traffic
from flash_attn_ext.series.traffic import paper_table

plots.use_style()
torch.manual_seed(1)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32  # what one trains with there
print("device:", device, "| threads:", torch.get_num_threads())

# %% [markdown]
# ## A party
#
# In attention every token looks at every token. It is a party where everybody has a word with
# everybody, and the host counts conversations. Twice the guests make four times the conversations.

# %%
plots.party()
pyplot.show()

# %% [markdown]
# What A thinks of B is not what B thinks of A, and everybody has thoughts about themselves: $N$
# guests make $N^2$ of these numbers, called *scores*. The textbook way is to write all of them into
# a matrix $S$ of size $N \times N$, for each head of each layer.
#
# ### Exercise 1: how large is S?
#
# Count the bytes of $S$ for one layer. (The check of an exercise tells you what is wrong if
# something is; the solutions are at the end.)


# %%
def my_score_bytes(batch, heads, n, element):
    # element: bytes of one number
    ...


exercises.score_bytes(my_score_bytes)

# %% [markdown]
# Here is what it comes to for one example and 16 heads in half precision:

# %%
texts = {
    "a page": 500,
    "a paper": 8_000,
    "a thesis": 60_000,
    "a novel": 150_000,
    "War and Peace": 780_000,
}
for name, n in texts.items():
    gib = 16 * n * n * 2 / 2**30
    inputs = 3 * 16 * n * 64 * 2 / 2**30
    print(f"{name:14} {n:8,} tokens   S: {gib:10,.2f} GiB   Q, K and V: {inputs:.3f} GiB")

# %% [markdown]
# A paper's $S$ already takes two gigabytes *in each layer*, and a novel's does not fit on any GPU.
# The inputs, $Q$, $K$ and $V$, are small all the way.
#
# ## Measure it
#
# This is textbook attention, as it was in the first GPT-2:
#
# ```python
# S = Q @ K.transpose(-2, -1) * scale  # [B, H, N, N]
# S = S.masked_fill(future, -inf)      # [B, H, N, N]
# P = dropout(softmax(S, dim=-1))      # [B, H, N, N]
# O = P @ V                            # [B, H, N, D]
# ```
#
# We run it forward and backward for growing $N$ and look at two things: the time, and the bytes
# that PyTorch has to keep for the backward pass.

# %%
HEADS, D = 4, 64


def textbook(q, k, v):
    return naive.attention(q, k, v, scale=D**-0.5, window=(-1, 0))


def inputs_of(n):
    shape, options = (1, HEADS, n, D), {"device": device, "dtype": dtype}
    return [torch.randn(shape, **options, requires_grad=True) for _ in range(3)]


def forward_backward(attend, n):
    inputs = inputs_of(n)
    gradient = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(attend(*inputs), inputs, gradient)


def measure(peers, lengths):
    seconds, megabytes = ({name: [] for name in peers} for _ in range(2))
    for n in lengths:
        calls = {name: forward_backward(attend, n) for name, attend in peers.items()}
        for name, sample in take_turns(calls, device=device, seconds=1.5).items():
            seconds[name].append(sample.best)
        for name, attend in peers.items():
            megabytes[name].append(saved_bytes(attend, *inputs_of(n)) / 2**20)
    return seconds, megabytes


def draw(lengths, seconds, megabytes):
    _, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2))
    milliseconds = {name: [1e3 * x for x in values] for name, values in seconds.items()}
    plots.against_length(left, lengths, milliseconds, "ms, forward + backward")
    plots.against_length(right, lengths, megabytes, "MiB kept for the backward")
    pyplot.show()


lengths = [128, 256, 512, 1024, 2048] if device == "cpu" else [512, 1024, 2048, 4096, 8192]
seconds, megabytes = measure({"naive": textbook}, lengths)
draw(lengths, seconds, megabytes)
slower = seconds["naive"][-1] / seconds["naive"][-3]
more = megabytes["naive"][-1] / megabytes["naive"][-3]
print(f"four times the tokens, at last: {slower:.0f} times the time, {more:.0f} times the memory")
assert megabytes["naive"][-1] > 3 * megabytes["naive"][-2]

# %% [markdown]
# Both axes are logarithmic, so a power of $N$ is a straight line. The lines climb two steps for
# each step to the right: $N^2$. Where the time climbs faster than that, $S$ has outgrown a cache:
# then there are four times as many numbers, and each of them takes longer to fetch.
#
# ## Where does the time go?
#
# One would think: into the two matrix products. They are where the arithmetic is, $2N^2d$
# operations each, while the softmax does a handful of operations for each of the $N^2$ scores. Let
# us time each step of GPT-2's attention on its own.

# %%
heads, n = (16, 1024) if device == "cuda" else (6, 1024)
q, k, v = (torch.randn(1, heads, n, D, device=device, dtype=dtype) for _ in range(3))
hidden = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
S = q @ k.mT
P = torch.softmax(S.masked_fill(hidden, -torch.inf), dim=-1)

samples = take_turns(
    {
        "S = Q Kᵀ": lambda: q @ k.mT,
        "mask": lambda: S.masked_fill(hidden, -torch.inf),
        "softmax": lambda: torch.softmax(S, dim=-1),
        "dropout": lambda: F.dropout(P, 0.1),
        "O = P V": lambda: P @ v,
    },
    device=device,
    seconds=3,
)
time_of = {name: sample.best for name, sample in samples.items()}
time_by_kind = {
    "product": time_of["S = Q Kᵀ"] + time_of["O = P V"],
    "mask": time_of["mask"],
    "softmax": time_of["softmax"],
    "dropout": time_of["dropout"],
}
counted = traffic(
    "standard", heads=heads, seq_q=n, head_dim=D, element=q.element_size(), mask=True, dropout=True
).forward


def shares(values):
    return {kind: 100 * value / sum(values.values()) for kind, value in values.items()}


kinds = ("product", "mask", "softmax", "dropout")
_, axes = pyplot.subplots(figsize=(8, 2.4))
plots.steps_bar(
    axes,
    {
        "arithmetic": shares({kind: counted.of_kind(kind).flops for kind in kinds}),
        "bytes moved": shares({kind: counted.of_kind(kind).bytes for kind in kinds}),
        "time, here": shares(time_by_kind),
    },
    unit="percent",
    factor=1,
)
axes.set_title("attention, forward: what it computes, what it moves, what takes the time")
pyplot.show()
for name, value in time_of.items():
    print(f"{name:10} {1e3 * value:8.2f} ms")

# %% [markdown]
# The top bar is almost all blue: nearly all of the arithmetic is in the products. The time is not.
# The steps that compute next to nothing, mask, softmax and dropout, take a large part of it,
# because each of them **reads a matrix of $N^2$ numbers from memory and writes one back**. The bar
# of the time looks more like the bar of the bytes.
#
# (On a CPU dropout is an extreme case: drawing the random numbers costs even more than moving
# them.)
#
# On a GPU this is far more pronounced: its products run on tensor cores, hundreds of times as fast
# as it can fetch numbers. In the paper's profile of GPT-2 on an A100 the products are the small
# part of the bar.
#
# **Attention is bound by memory, not by arithmetic.** A faster multiplier would not help. Fewer
# bytes would.
#
# ## Two ideas
#
# Think of the matrix as a giant pizza, and of the small memory beside the processor as the oven. It
# is fast, but the pizza does not fit.

# %%
plots.pizza()
pyplot.show()

# %% [markdown]
# **Tiling.** Cut it. A tile of $S$ fits in fast memory, and there all that has to be done with it
# can be done: mask it, take its softmax, drop out, multiply with $V$. Then the tile is forgotten.
# Only inputs and outputs travel, and these are small. (The softmax needs a whole row, you object.
# Notebook 4 has the answer.)
#
# **Recomputation.** Training needs $P$ again in the backward pass. Instead of storing it, bake the
# slice a second time, from $Q$, $K$ and one number for each row. That is *more* arithmetic and
# *less* time, since arithmetic was not what we waited for.
#
# What does that do to a real model? Here are the paper's figures for the attention of GPT-2 medium,
# forward and backward, on an A100, next to what `series/traffic.py` counts, step by step.

# %%
table = paper_table()
print(f"{'':10}{'GFLOP':>8}{'paper':>8}{'GB moved':>12}{'paper':>8}")
for name, row in table.items():
    print(
        f"{name:10}{row['GFLOP']:8.1f}{row['GFLOP, paper']:8.1f}"
        f"{row['GB']:12.1f}{row['GB, paper']:8.1f}"
    )

# %% [markdown]
# Some more arithmetic, **nine times fewer bytes**; in the paper's measurement the time fell from
# 41.7 to 7.3 ms. (How these are counted, and what the paper leaves open, is written in
# `traffic.paper_table`; notebook 3 takes the count apart. The times measured again, on a GPU and on
# a CPU, are in `docs/paper.md`.)
#
# ## Three lines
#
# ```python
# import flash_attn_ext
#
# out = flash_attn_ext.scaled_dot_product_attention(q, k, v, is_causal=True)
# ```
#
# It takes the arguments of `torch.nn.functional.scaled_dot_product_attention` and means the same.
# Is it the same?

# %%
q, k, v = inputs_of(500)
ours = flash_attn_ext.scaled_dot_product_attention(q, k, v, is_causal=True)
difference = (ours - textbook(q, k, v)).abs().max().item()
print(f"largest difference from the textbook: {difference:.1e}")
assert difference < (1e-4 if dtype == torch.float32 else 1e-2)
print(flash_attn_ext.explain(q, k, v, is_causal=True))

# %% [markdown]
# Exact, up to rounding. Now the first plot again, with PyTorch's own fused attention (SDPA) for
# company. All take turns, so that whatever else this machine does slows all of them down alike.

# %%
peers = {
    "naive": textbook,
    "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "ours": lambda q, k, v: flash_attn_ext.scaled_dot_product_attention(q, k, v, is_causal=True),
}
seconds, megabytes = measure(peers, lengths)
draw(lengths, seconds, megabytes)
faster = seconds["naive"][-1] / seconds["ours"][-1]
less = megabytes["naive"][-1] / megabytes["ours"][-1]
print(f"N = {lengths[-1]}: {faster:.1f} times as fast as naive, keeps {less:.0f} times less")
assert megabytes["ours"][-1] < 2.5 * megabytes["ours"][-2]

# %% [markdown]
# The memory has become a line of slope one: twice the tokens, twice the bytes. The time still has
# slope two, as $N^2$ scores are still computed, exactly; they just do not travel any more.
#
# Back to the book that a model shall remember. Going by the last point of each curve, how long may
# a text be until *one layer* of 16 heads has filled the memory of this machine?

# %%
if device == "cuda":
    memory = torch.cuda.get_device_properties(0).total_memory
else:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
times = memory / 2**20 * HEADS / 16  # how many times the MiB of HEADS heads fit for 16
print(f"with {memory / 2**30:.0f} GiB:")
for name, power in (("naive", 2), ("ours", 1)):  # the bytes grow with this power of N
    longest = lengths[-1] * (times / megabytes[name][-1]) ** (1 / power)
    fits = [text for text, n in texts.items() if n <= longest]
    print(f"{name:6} {longest:12,.0f} tokens: {fits[-1]}")

# %% [markdown]
# (To hold it. To compute it takes a while, still: that is the $N^2$ of the time.)
#
# A model that exists already need not be touched. `enable()` puts ours in the place of PyTorch's
# function, wherever it is called, until `disable()`:

# %%
layer = torch.nn.TransformerEncoderLayer(256, 4, batch_first=True, dropout=0.0, device=device)
x = torch.randn(2, 200, 256, device=device)
before = layer(x)
flash_attn_ext.enable()
after = layer(x)
flash_attn_ext.disable()
print(f"largest difference: {(before - after).abs().max().item():.1e}")
assert torch.allclose(before, after, atol=1e-4)

# %% [markdown]
# ### Exercise 2: your turn
#
# Write causal attention for $q, k, v$ so that no $N \times N$ matrix is kept. The check counts the
# bytes.


# %%
def my_drop_in(q, k, v):
    # one line
    ...


exercises.drop_in(my_drop_in)

# %% [markdown]
# **Next:** `2_attention_from_scratch` builds attention itself, one dot product after the other.
# `3_memory_hierarchy` measures the memory wall. `4_flash_attention_from_scratch` takes the
# algorithm apart, down to C and CUDA.
#
# ## Solutions


# %%
def solved_score_bytes(batch, heads, n, element):
    return batch * heads * n * n * element


exercises.score_bytes(solved_score_bytes)


# %%
def solved_drop_in(q, k, v):
    return flash_attn_ext.scaled_dot_product_attention(q, k, v, is_causal=True)


exercises.drop_in(solved_drop_in)
