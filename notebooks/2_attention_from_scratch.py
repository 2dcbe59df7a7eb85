# %% [markdown]
# # 2. Attention from scratch
#
# From one dot product to multi-head causal attention, in six small steps. After each one we check
# against PyTorch's own `scaled_dot_product_attention` (SDPA). Then we train a tiny attention layer
# until it does something clever and look at what it does; and at the end we count, and measure,
# what attention costs.

# %%
import math

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from torch.utils.flop_counter import FlopCounterMode

from flash_attn_ext.measure import take_turns
from flash_attn_ext.series import exercises, plots, traffic

plots.use_style()
torch.manual_seed(2)
device = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# ## Step 1: a dictionary that takes "roughly" for an answer
#
# A Python `dict` compares a query with its keys and gives the value of the one that is equal.
# Attention is the soft version: it compares the query with *all* keys, and gives a mixture of *all*
# values, in which those count most whose key is most alike.
#
# The measure of alikeness is the dot product. Here is a sentence whose words have features made by
# hand: is it a living thing, a place, an action, a pronoun?

# %%
tokens = ["the", "cat", "sat", "on", "the", "mat", "because", "it", "purred"]
features = torch.tensor(
    [  # living, place, action, pronoun
        [0.0, 0.0, 0.0, 0.1],
        [2.0, 0.1, 0.0, 0.0],
        [0.1, 0.0, 2.0, 0.0],
        [0.0, 0.6, 0.1, 0.0],
        [0.0, 0.0, 0.0, 0.1],
        [0.1, 2.0, 0.0, 0.0],
        [0.0, 0.0, 0.2, 0.0],
        [0.6, 0.0, 0.0, 2.0],
        [0.3, 0.0, 2.0, 0.0],
    ]
)
q = torch.tensor([3.0, 0.5, 0.0, 0.0])  # what "it" is looking for: something living
scores = features @ q  # [9]: one dot product for each key
for token, score in zip(tokens, scores):
    print(f"{token:8} {score:5.2f} {'#' * int(8 * score)}")

# %% [markdown]
# ## Step 2: from scores to weights
#
# The weights of a mixture should be positive and add up to 1. That is what the softmax does: $w_j =
# e^{s_j} / \sum_k e^{s_k}$. A difference between two scores becomes a ratio between two weights.
#
# Before that the scores are divided by $\sqrt{d}$. Why? A dot product of $d$ random numbers has the
# variance $d$: the longer the vectors, the wilder the scores, until the softmax is all or nothing
# and no gradient gets through. Look at the largest weight among 64 keys:

# %%
sizes = [2**k for k in range(1, 11)]
largest = {"q · k": [], "q · k / sqrt(d)": []}
for d in sizes:
    s = torch.randn(200, 1, d) @ torch.randn(200, d, 64)  # 200 queries, 64 keys each
    for name, scaled in (("q · k", s), ("q · k / sqrt(d)", s / math.sqrt(d))):
        largest[name].append(torch.softmax(scaled, dim=-1).amax(-1).mean().item())

_, axes = pyplot.subplots(figsize=(6, 2.6))
for (name, values), color in zip(largest.items(), (plots.KINDS["softmax"], plots.FAST)):
    axes.plot(sizes, values, "o-", color=color, label=name)
axes.set_xscale("log", base=2)
axes.set(xlabel="head size d", ylabel="largest weight", ylim=(0, 1))
axes.legend()
pyplot.show()

# %% [markdown]
# ## Step 3: the output for one query
#
# Weights times values, summed. That is attention for one query.

# %%
weights = torch.softmax(features @ q / math.sqrt(4), dim=0)
_, axes = pyplot.subplots(figsize=(9, 2.8))
plots.one_query(axes, weights, tokens, query=7)
axes.set_title('"it" looks for something living, and finds the cat')
pyplot.show()
assert tokens[weights.argmax()] == "cat"

# %% [markdown]
# ### Exercise 1: one query
#
# Put the three steps together: scores, scaled and through a softmax, then the mixture of the
# values.


# %%
def my_one_query(q, K, V):
    # q: [D]   K: [N, D]   V: [N, Dv]   ->   [Dv]
    ...


exercises.one_query(my_one_query)

# %% [markdown]
# ## Step 4: all queries at once
#
# Every token asks a question of its own. Where does it come from? From the token itself, times a
# matrix $W_Q$ that says what a token like this looks for: a pronoun for something living, an action
# for whoever does it and for a place. Here it is made by hand, as the features are; a model learns
# it, and likewise a $W_K$ (what a token has to offer) and a $W_V$ (what it hands over).

# %%
W_Q = torch.tensor(
    [  # looks for: living, place, action, pronoun
        [0.0, 0.0, 1.5, 0.0],  # something living
        [0.0, 0.0, 0.5, 0.0],  # a place
        [1.5, 0.5, 0.0, 0.0],  # an action
        [1.5, 0.2, 0.0, 0.0],  # a pronoun
    ]
)
queries = features @ W_Q  # [9, 4]
print("it     looks for", queries[7])
print("purred looks for", queries[8])

# %% [markdown]
# Stack the queries, and the scores are one matrix product, the mixtures another. This is the whole
# formula, and the two shape comments in its middle are the trouble of this series:


# %%
def attention(Q, K, V):
    """Q: [N, D]. K: [N, D]. V: [N, D]."""
    S = Q @ K.mT / math.sqrt(Q.size(-1))  # [N, N]
    P = torch.softmax(S, dim=-1)  # [N, N]: each row adds up to 1
    return P @ V  # [N, D]


Q, K, V = (torch.randn(10, 16) for _ in range(3))
assert torch.allclose(attention(Q, K, V), F.scaled_dot_product_attention(Q, K, V), atol=1e-6)
print("the same as SDPA")

# %% [markdown]
# ## Step 5: no peeking
#
# A language model predicts the next token, so a token must not see those after it. Scores of the
# future become $-\infty$ *before* the softmax; $e^{-\infty} = 0$, and the rest still adds up to 1.
# (Zeroing the weights *after* the softmax would not do: the row would add up to less.)
#
# ### Exercise 2: the causal mask


# %%
def my_causal_mask(n):
    # [n, n] bool: True where query i (row) may look at key j (column)
    ...


exercises.causal_mask(my_causal_mask)


# %%
def causal_attention(Q, K, V):
    """Q, K, V: [..., N, D]."""
    N, D = Q.shape[-2:]
    S = Q @ K.mT / math.sqrt(D)  # [..., N, N]
    future = torch.ones(N, N, dtype=torch.bool, device=Q.device).triu(1)
    P = torch.softmax(S.masked_fill(future, -torch.inf), dim=-1)  # [..., N, N]
    return P @ V


expected = F.scaled_dot_product_attention(Q, K, V, is_causal=True)
assert torch.allclose(causal_attention(Q, K, V), expected, atol=1e-6)

S = queries @ features.T / math.sqrt(4)
future = torch.ones_like(S).triu(1).bool()
_, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.6))
plots.attention_map(left, torch.softmax(S, -1), tokens, "every token sees all")
masked = torch.softmax(S.masked_fill(future, -torch.inf), -1)
plots.attention_map(right, masked, tokens, "causal: only what came before")
pyplot.show()

# %% [markdown]
# A row is a query, a column a key. *sat*, *it* and *purred* find the cat, while *the* has nothing
# to ask and looks everywhere. On the left the cat finds what it does, *sat* and *purred*; on the
# right neither has happened yet. Half of the picture on the right is empty, for every causal model:
# FlashAttention skips that half instead of computing and hiding it.
#
# ## Step 6: many heads
#
# One softmax is one point of view. A token may want to look at its verb *and* at its subject, so
# the vector of $C$ numbers is cut into $H$ heads of $D = C / H$, each with an attention of its own.
# To the code above it is one more dimension in front.
#
# ### Exercise 3: split the heads


# %%
def my_split_heads(x, heads):
    # x: [B, N, C]   ->   [B, heads, N, C / heads]
    ...


exercises.split_heads(my_split_heads)


# %%
class MultiHeadAttention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.project = torch.nn.Linear(width, width)

    def forward(self, x):  # [B, N, C]
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, D]
        Q, K, V = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        O = causal_attention(Q, K, V)  # [B, H, N, D]
        return self.project(O.transpose(1, 2).flatten(2))  # [B, N, C]


ours = MultiHeadAttention(width=32, heads=4)
theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
with torch.no_grad():
    theirs.in_proj_weight.copy_(ours.qkv.weight)
    theirs.in_proj_bias.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.project.state_dict())
x = torch.randn(2, 10, 32)
mask = torch.nn.Transformer.generate_square_subsequent_mask(10)
expected, _ = theirs(x, x, x, attn_mask=mask, is_causal=True)
assert torch.allclose(ours(x), expected, atol=1e-5)
print("the same as nn.MultiheadAttention with the same weights")

# %% [markdown]
# ## What attention learns
#
# Hand-made features are a cheat. Let us see attention find its own. The task is a dictionary: a few
# `letter -> digit` pairs in random order, then a letter without its digit. The answer is in the
# context, and only there, so the layer has to *look it up*. One head, 32 numbers a token, a few
# seconds of training.

# %%
LETTERS, DIGITS, PAIRS = 12, 10, 8


class LookUp(torch.nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.letter = torch.nn.Embedding(LETTERS, width)
        self.digit = torch.nn.Embedding(DIGITS + 1, width)  # the last one: "?"
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.answer = torch.nn.Linear(width, DIGITS)

    def weights(self, letters, digits):
        x = self.letter(letters) + self.digit(digits)  # [B, N, C]
        Q, K, V = self.qkv(x).chunk(3, dim=-1)  # each [B, N, C]
        return torch.softmax(Q @ K.mT / math.sqrt(Q.size(-1)), dim=-1), V

    def forward(self, letters, digits):
        P, V = self.weights(letters, digits)
        return self.answer((P @ V)[:, -1])  # only the last token has a question


def draw_batch(size):
    letters = torch.rand(size, LETTERS).argsort(dim=1)[:, :PAIRS]  # each letter at most once
    digits = torch.randint(DIGITS, (size, PAIRS))
    asked = torch.randint(PAIRS, (size, 1))
    letters = torch.cat([letters, letters.gather(1, asked)], dim=1)
    answers = digits.gather(1, asked).squeeze(1)
    return letters, torch.cat([digits, torch.full((size, 1), DIGITS)], dim=1), answers


model = LookUp()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
losses = []
for _ in range(250):
    letters, digits, answers = draw_batch(128)
    loss = F.cross_entropy(model(letters, digits), answers)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

letters, digits, answers = draw_batch(2000)
accuracy = (model(letters, digits).argmax(1) == answers).float().mean().item()
print(f"accuracy on new dictionaries: {accuracy:.1%} (by chance: {1 / DIGITS:.0%})")
assert accuracy > 0.9

# %%
with torch.no_grad():
    P, _ = model.weights(letters[:1], digits[:1])
names = [
    f"{chr(65 + letter)}={'?' if digit == DIGITS else digit}"
    for letter, digit in zip(letters[0].tolist(), digits[0].tolist())
]
_, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), width_ratios=[1, 1.1])
left.plot(losses, color=plots.FAST)
left.axhline(math.log(DIGITS), color=plots.EDGE, linestyle=":", label="guessing")
left.set(xlabel="step", ylabel="loss")
left.legend()
plots.attention_map(right, P[0], names, "learnt: the last row looks up its letter")
pyplot.show()

# %% [markdown]
# Nobody told the layer to compare letters. The last row, the question, puts its weight on the pair
# that has the same letter. It found out that $Q$ and $K$ should be about letters, and $V$ about
# digits.
#
# ## The bill
#
# Now count. Both products are of the kind $[N, d] \times [d, N]$: $2N^2d$ operations each, $4N^2d$
# together, for each head. And there are two matrices of $N^2$ numbers. PyTorch can count the
# operations of a call, so let it:

# %%
Q, K, V = (torch.randn(1, 4, 256, 64) for _ in range(3))
with FlopCounterMode(display=False) as counter:
    causal_attention(Q, K, V)
ours = traffic("standard", heads=4, seq_q=256, head_dim=64).forward.of_kind("product").flops
print(f"PyTorch counts {counter.get_total_flops():,}, 4 N^2 d for 4 heads is {ours:,}")
assert counter.get_total_flops() == ours == 4 * 256**2 * 64 * 4

# %% [markdown]
# The other layers of a transformer cost something for each token and nothing for a *pair* of
# tokens: the four projections of attention $8C^2$ a token, the MLP $16C^2$. In GPT-2 small ($C =
# 768$) short texts are dominated by these, long ones by attention:

# %%
C = 768
lengths = [2**k for k in range(7, 16)]
bill = {
    "projections": [8 * C * C * n for n in lengths],
    "MLP": [16 * C * C * n for n in lengths],
    "attention": [4 * n * n * C for n in lengths],
}
totals = [sum(parts) for parts in zip(*bill.values())]
_, axes = pyplot.subplots(figsize=(7, 2.8))
shares = [[100 * x / t for x, t in zip(values, totals)] for values in bill.values()]
axes.stackplot(
    range(len(lengths)),
    shares,
    labels=bill,
    colors=[plots.IDLE, plots.DONE, plots.KINDS["softmax"]],
)
axes.set_xticks(range(len(lengths)), lengths)
axes.set(xlabel="sequence length N", ylabel="% of a layer's operations", ylim=(0, 100))
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
pyplot.show()

# %% [markdown]
# And is it what the clock says? Time against $N$ for our attention, beside the count of operations,
# both relative to the shortest:

# %%
lengths = [128, 256, 512, 1024, 2048]
seconds, flops = [], []
threads = torch.get_num_threads()
torch.set_num_threads(1)  # a single one is disturbed least by what else runs here
for n in lengths:
    Q, K, V = (torch.randn(1, 4, n, 64, device=device) for _ in range(3))
    calls = {"attention": lambda Q=Q, K=K, V=V: causal_attention(Q, K, V)}
    seconds.append(take_turns(calls, device=device, seconds=1)["attention"].best)
    flops.append(traffic("standard", heads=4, seq_q=n, head_dim=64, mask=True).forward.flops)
torch.set_num_threads(threads)

_, axes = pyplot.subplots(figsize=(6.5, 3))
relative = {
    "operations, counted": [x / flops[0] for x in flops],
    "time, measured": [x / seconds[0] for x in seconds],
}
plots.against_length(axes, lengths, relative, f"relative to N = {lengths[0]}")
pyplot.show()
rate = [f / s / 1e9 for f, s in zip(flops, seconds)]
print("GFLOP/s:", ", ".join(f"{n}: {r:.0f}" for n, r in zip(lengths, rate)))

# %% [markdown]
# Quadratic, both of them. But look at the last line: the rate at which the machine works *falls*
# where $N$ is large, although the products only become larger and better to compute. At $N = 2048$
# four heads of $S$ are 64 MB, more than most caches hold. From there on the machine is waiting for
# its memory. What memory is like, and how long the wait, is the subject of `3_memory_hierarchy`.
#
# ## Solutions


# %%
def solved_one_query(q, K, V):
    weights = torch.softmax(K @ q / math.sqrt(len(q)), dim=0)  # [N]
    return weights @ V


exercises.one_query(solved_one_query)


# %%
def solved_causal_mask(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


exercises.causal_mask(solved_causal_mask)


# %%
def solved_split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


exercises.split_heads(solved_split_heads)
