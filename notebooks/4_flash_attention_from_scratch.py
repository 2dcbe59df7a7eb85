# %% [markdown]
# # 4. FlashAttention from scratch
#
# Attention is slow because of a matrix that nobody asked for. We want $O$, of size $N \times d$; on
# the way the textbook formula builds $S$ and $P$, of size $N \times N$, writes them to slow memory
# and reads them back.
#
# FlashAttention gives **the same $O$ without ever having $S$ or $P$**. It stands on two ideas:
#
# 1. **Tiling**: compute a small tile of $S$, use it up, forget it. The obstacle is the softmax,
#    which seems to need a whole row at once. *Online softmax* removes it.
# 2. **Recomputation**: the backward needs $P$ again. Do not store it: compute each tile a second
#    time.
#
# We build both in small steps, check each against the textbook, and then read the same loop in C
# and in CUDA.

# %%
import inspect
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from IPython.display import Image, Markdown, display
from matplotlib import pyplot

import flash_attn_ext
from flash_attn_ext import _C
from flash_attn_ext.measure import saved_bytes, take_turns
from flash_attn_ext.series import dropout, exercises, naive, plots, quote, tiled

plots.use_style()
torch.manual_seed(4)
device = "cuda" if torch.cuda.is_available() else "cpu"
print("device:", device)

# %% [markdown]
# ## Step 1: a softmax that does not overflow
#
# The definition, $\mathrm{softmax}(x)_j = e^{x_j} / \sum_k e^{x_k}$, breaks early: in float32
# $e^{89}$ is already infinite.


# %%
def softmax(x):  # [N]
    return torch.exp(x) / torch.exp(x).sum()


x = torch.tensor([1.0, 3.0, 88.0, 90.0])
print("as defined:", softmax(x))

# %% [markdown]
# The cure is to subtract the maximum $m$. The function stays the same, because a factor $e^{-m}$
# above and below cancels:
#
# $$\frac{e^{x_j - m}}{\sum_k e^{x_k - m}} = \frac{e^{-m}\,e^{x_j}}{e^{-m}\sum_k e^{x_k}}$$
#
# But look at the price: **three passes** over $x$, one each for the maximum, for the sum and for
# the result. A row of $S$ that does not fit into fast memory has to come from slow memory three
# times.


# %%
def safe_softmax(x):  # [N]
    m = x.max()  # first pass
    l = torch.exp(x - m).sum()  # second pass
    return torch.exp(x - m) / l  # third pass


print("safe:      ", safe_softmax(x))
assert torch.allclose(safe_softmax(x), torch.softmax(x, dim=0))

# %% [markdown]
# ## Step 2: online softmax, one number at a time
#
# Can $m$ and $l$ be found together, in one pass? When $x_j$ arrives, the maximum so far may turn
# out too small, and then the sum $l$ was made with the wrong one. Throwing it away is not needed.
# **It is wrong by a factor that we know.**
#
# The proof takes two lines. With $m' = \max(m, x_j)$, for the numbers seen before:
#
# $$\begin{aligned}
# \sum_k e^{x_k - m'} &= \sum_k e^{x_k - m}\,e^{m - m'} \\ &= l \cdot e^{m - m'} \end{aligned}$$
#
# So: multiply the old sum by $e^{m - m'}$, add the newcomer, go on.


# %%
def online_statistics(x):  # [N] -> the m and l after each number
    m, l, history = torch.tensor(-torch.inf), torch.tensor(0.0), []
    for x_j in x:
        m_new = torch.maximum(m, x_j)
        l = l * torch.exp(m - m_new) + torch.exp(x_j - m_new)
        m = m_new
        history.append((m.item(), l.item()))
    return history


x = torch.tensor([0.5, 1.2, 0.1, 1.0, 2.4, 0.3, 2.0, 1.1, 3.6, 3.2, 0.4, 2.9])
history = online_statistics(x)
m, l = history[-1]
assert torch.allclose(torch.exp(x - m) / l, torch.softmax(x, dim=0))

_, axes = pyplot.subplots(figsize=(7.5, 3))
plots.running_softmax(axes, x, *zip(*history), "a new maximum shrinks the sum so far")
pyplot.show()

# %% [markdown]
# Where the green line steps up, all that was seen before counts for less: look at the red one at 5
# and at 9. That is all of online softmax (Milakov and Gimelshein, 2018).
#
# ### Exercise 1: merge two halves
#
# Somebody has done the first half of a row and has $m_1, l_1$; somebody else has done the second
# half. What are $m$ and $l$ of the whole row? (This is how a long row is shared out among threads,
# or among GPUs.)


# %%
def my_merge(m1, l1, m2, l2):
    # m = ...
    # l = ...
    # return m, l
    ...


exercises.merge(my_merge)

# %% [markdown]
# ## Step 3: the output comes along
#
# We do not want the softmax, we want $O = PV$. Leave out the division by $l$ for now, and a row of
# $O$ is a sum of the same exponentials, $\sum_j e^{S_j - m}\,V_j$. So it follows a new maximum **by
# the same factor** as $l$:
#
# $$\sum_j e^{S_j - m'}\,V_j = e^{m - m'} \sum_j e^{S_j - m}\,V_j$$
#
# Nothing in it asks for single numbers: `block_n` keys can arrive at a time, for `block_m` queries
# at once. One division by $l$ at the very end normalises all.


# %%
def online_attention(Q_i, K, V, block_n):
    """softmax(Q_i K^T) V for block_m queries in one pass over K and V."""
    m = torch.full((len(Q_i), 1), -torch.inf)  # [block_m, 1]
    l = torch.zeros(len(Q_i), 1)  # [block_m, 1]
    O_i = torch.zeros(len(Q_i), V.size(1))  # [block_m, Dv]
    for K_j, V_j in zip(K.split(block_n), V.split(block_n)):
        S = Q_i @ K_j.T  # [block_m, block_n]: all there ever is of N x N
        m_new = torch.maximum(m, S.amax(dim=1, keepdim=True))
        P = torch.exp(S - m_new)  # [block_m, block_n]
        rescale = torch.exp(m - m_new)  # [block_m, 1]
        l = l * rescale + P.sum(dim=1, keepdim=True)
        O_i = O_i * rescale + P @ V_j
        m = m_new
    return O_i / l


Q_i, K, V = torch.randn(8, 16), torch.randn(100, 16), torch.randn(100, 16)
expected = torch.softmax(Q_i @ K.T, dim=1) @ V
for block_n in (1, 7, 32, 100):
    error = (online_attention(Q_i, K, V, block_n) - expected).abs().max().item()
    print(f"block_n = {block_n:3}: largest difference {error:.1e}")
    assert error < 1e-5

# %% [markdown]
# Any block size gives the same result, up to float32 rounding. **FlashAttention is not an
# approximation.**
#
# ### Exercise 2: the heart of it, from memory
#
# Scroll the cell above out of sight and write the update for one tile of keys. `S` is given,
# already computed.


# %%
def my_online_step(m, l, O, S, V):
    # m, l: [M, 1]   O: [M, Dv], not divided by l   S: [M, block_n]   V: [block_n, Dv]
    # return the new m, l, O
    ...


exercises.online_step(my_online_step)

# %% [markdown]
# ## Step 4: the forward
#
# One more loop around it, over tiles of queries, and that is FlashAttention's forward. Three
# details make it complete: the `scale`, the causal mask, and `lse = m + log l`, the **log-sum-exp**
# of each row: $N$ numbers which will let the backward rebuild any tile of $P$.


# %%
def flash_forward(Q, K, V, scale, causal=False, block_m=64, block_n=64):
    """Q, K, V: [..., N, D]. Returns O: [..., N, D] and lse: [..., N]."""
    N = Q.size(-2)
    O, lse = torch.empty_like(Q), Q.new_empty(Q.shape[:-1])
    for i in range(0, N, block_m):
        Q_i = Q[..., i : i + block_m, :]  # [..., block_m, D]
        m = Q_i.new_full((*Q_i.shape[:-1], 1), -torch.inf)  # [..., block_m, 1]
        l = torch.zeros_like(m)
        O_i = torch.zeros_like(Q_i)
        for j in range(0, N, block_n):
            if causal and j > i + block_m - 1:
                break  # the first key comes after the last query: nothing to see from here on
            K_j, V_j = K[..., j : j + block_n, :], V[..., j : j + block_n, :]
            S = scale_and_mask(Q_i @ K_j.mT, i, j, scale, causal)  # [..., block_m, block_n]

            m_new = torch.maximum(m, S.amax(dim=-1, keepdim=True))
            P = torch.exp(S - m_new)
            rescale = torch.exp(m - m_new)
            l = l * rescale + P.sum(dim=-1, keepdim=True)
            O_i = O_i * rescale + P @ V_j
            m = m_new
        O[..., i : i + block_m, :] = O_i / l
        lse[..., i : i + block_m] = (m + torch.log(l)).squeeze(-1)
    return O, lse


def scale_and_mask(S, i, j, scale, causal):
    """S belongs to the queries from i and the keys from j on."""
    S = scale * S
    if causal:
        queries = i + torch.arange(S.size(-2), device=S.device)[:, None]
        keys = j + torch.arange(S.size(-1), device=S.device)
        S = S.masked_fill(keys > queries, -torch.inf)
    return S


# %% [markdown]
# Is it exact? Let float64 be the truth and compare two errors: that of the textbook in float32, and
# ours for many tile sizes.

# %%
N, D = 300, 32  # on purpose no multiple of a tile
Q, K, V = (torch.randn(2, 4, N, D, device=device, dtype=torch.float64) for _ in range(3))
scale = D**-0.5
truth = naive.attention(Q, K, V, scale=scale, window=(-1, 0))
single = [x.float() for x in (Q, K, V)]


def error(result):
    return (result.double() - truth).square().mean().sqrt().item()


textbook = error(naive.attention(*single, scale=scale, window=(-1, 0)))
errors = {
    f"{m} x {n}": error(flash_forward(*single, scale, True, m, n)[0])
    for m, n in [(1, 32), (16, 16), (32, 64), (64, 64), (128, 128), (300, 300)]
}
assert max(errors.values()) < 2 * textbook

_, axes = pyplot.subplots(figsize=(7, 2.6))
axes.bar(list(errors), list(errors.values()), color=plots.FAST, label="flash_forward by tile size")
axes.axhline(textbook, color=plots.KINDS["softmax"], label="textbook")
axes.set_title("error against float64 (root of the mean square), computed in float32")
axes.legend(fontsize=8, loc="lower right", facecolor="white", framealpha=0.9, frameon=True)
pyplot.show()

# %% [markdown]
# As exact as the textbook: what differs is the order in which rounded numbers are added.
#
# Now watch it. Each small square is a tile of $S$. Green things are in fast memory at that moment,
# orange ones in slow memory. A tile of $S$ and $P$ turns green once and vanishes; and with a causal
# mask the white half is never even looked at.

# %%
plots.film_strip()
pyplot.show()

# %%
Image(plots.sweep())

# %% [markdown]
# ### Exercise 3: which tiles can be skipped?
#
# In the causal case, given the `range` of a tile's queries and that of its keys, say whether the
# whole tile is hidden.


# %%
def my_can_skip(rows, cols):
    # return True or False
    ...


exercises.can_skip(my_can_skip)

# %% [markdown]
# ### Exercise 4: two halves of the keys
#
# A long text is shared out: one GPU has the first half of $K$ and $V$, another the second, and both
# have run the forward for the same queries. Here are their results, finished, each divided by its
# own $l$. What are $O$ and `lse` over all keys? (Ring attention and flash decoding stand on this,
# and so do our C kernels where a few queries have many keys, for threads to share.)


# %%
def my_merge_outputs(O1, lse1, O2, lse2):
    # O1, O2: [M, Dv]   lse1, lse2: [M, 1]
    # lse = ...
    # return O, lse
    ...


exercises.merge_outputs(my_merge_outputs)

# %% [markdown]
# ## Step 5: the backward, on paper
#
# Given $dO$, the gradient of the loss with respect to $O$, we want $dQ$, $dK$ and $dV$. Walk back
# through the three lines of the forward, $S = \mathrm{scale} \cdot QK^T$, $P =
# \mathrm{softmax}(S)$, $O = PV$:
#
# **Through $O = PV$**, a product: $\quad dV = P^T dO, \quad dP = dO\,V^T$.
#
# **Through the softmax.** Of one row: $\partial P_j / \partial S_k = P_j\,([j = k] - P_k)$, so that
#
# $$dS_k = \sum_j dP_j\,P_j\,([j = k] - P_k)
# = P_k\,\bigl(dP_k - \underbrace{\textstyle\sum_j P_j\,dP_j}_{\delta}\bigr)$$
#
# **Through $S$**, a product again: $\quad dQ = \mathrm{scale} \cdot dS\,K, \quad dK =
# \mathrm{scale} \cdot dS^T Q$.
#
# Two things stand in the way of tiles. First, $P$ is gone; but from the saved log-sum-exp any tile
# of it comes back, already normalised: $P = e^{S - \mathrm{lse}}$. Second, $\delta$ is a sum over a
# *whole* row. Here is the trick that makes it work:
#
# $$\delta = \sum_j P_j\,dP_j = \sum_j P_j \sum_c dO_c\,V_{jc}
# = \sum_c dO_c \sum_j P_j V_{jc} = \sum_c dO_c\,O_c$$
#
# $\delta$ is the dot product of a row of $dO$ with the same row of $O$. Nobody has to see a row of
# $P$.

# %%
q, k, v, do = (torch.randn(50, 8, dtype=torch.float64) for _ in range(4))
P = torch.softmax(q @ k.T, dim=1)
dP = do @ v.T
assert torch.allclose((P * dP).sum(dim=1), (do * (P @ v)).sum(dim=1))
print("delta, both ways, the same for all 50 rows")

# %% [markdown]
# ### Exercise 5: back through the softmax, for one tile
#
# You get tiles of $P$ and $dP$, and the whole rows of $O$ and $dO$ that belong to them. Return the
# tile of $dS$.


# %%
def my_softmax_backward(P, dP, O, dO):
    # delta = ...
    ...


exercises.softmax_backward(my_softmax_backward)

# %% [markdown]
# ## Step 6: the backward, in code
#
# The loops change places. In the forward a tile of queries stays and keys pass by, since each query
# owns a row of $O$. In the backward a tile of **keys** stays: it owns rows of $dK$ and $dV$,
# finished when the last query has passed. $dQ$ is added to on every visit.


# %%
def flash_backward(dO, Q, K, V, O, lse, scale, causal=False, block_m=64, block_n=64):
    """dO: [..., N, D]. Returns dQ, dK, dV: [..., N, D]."""
    N = Q.size(-2)
    dQ, dK, dV = torch.zeros_like(Q), torch.zeros_like(K), torch.zeros_like(V)
    delta = (dO * O).sum(dim=-1, keepdim=True)  # [..., N, 1]
    lse = lse.unsqueeze(-1)  # [..., N, 1]
    for j in range(0, N, block_n):
        cols = slice(j, j + block_n)
        K_j, V_j = K[..., cols, :], V[..., cols, :]  # [..., block_n, D]
        for i in range(0, N, block_m):
            if causal and j > i + block_m - 1:
                continue
            rows = slice(i, i + block_m)
            Q_i, dO_i = Q[..., rows, :], dO[..., rows, :]  # [..., block_m, D]
            S = scale_and_mask(Q_i @ K_j.mT, i, j, scale, causal)
            P = torch.exp(S - lse[..., rows, :])  # recomputed: [..., block_m, block_n]
            dP = dO_i @ V_j.mT
            dS = P * (dP - delta[..., rows, :])

            dV[..., cols, :] += P.mT @ dO_i
            dK[..., cols, :] += scale * dS.mT @ Q_i
            dQ[..., rows, :] += scale * dS @ K_j
    return dQ, dK, dV


# %% [markdown]
# The judge is autograd, which differentiates the textbook formula without knowing any of this:

# %%
leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
dO = torch.randn_like(truth)
expected = torch.autograd.grad(naive.attention(*leaves, scale=scale, window=(-1, 0)), leaves, dO)

O, lse = flash_forward(Q, K, V, scale, causal=True)
for name, ours, theirs in zip(
    ("dQ", "dK", "dV"), flash_backward(dO, Q, K, V, O, lse, scale, causal=True), expected
):
    print(f"{name}: largest difference {(ours - theirs).abs().max().item():.1e}")
    assert torch.allclose(ours, theirs)

# %% [markdown]
# Together they are an operator that a model can train with:


# %%
class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, Q, K, V, scale, causal):
        O, lse = flash_forward(Q, K, V, scale, causal)
        ctx.save_for_backward(Q, K, V, O, lse)  # O(N): there is no P among them
        ctx.options = scale, causal
        return O

    @staticmethod
    def backward(ctx, dO):
        return *flash_backward(dO, *ctx.saved_tensors, *ctx.options), None, None


tiny = [x[:1, :1, :20, :4].clone().requires_grad_() for x in (Q, K, V)]
assert torch.autograd.gradcheck(lambda *x: FlashAttention.apply(*x, 0.5, True), tiny)
print("gradcheck passed: the gradients agree with finite differences")

# %% [markdown]
# And what have we gained? Count the bytes that autograd keeps between forward and backward:
# exactly, tensor by tensor.

# %%
implementations = {
    "naive": lambda q, k, v: naive.attention(q, k, v, scale=0.125, window=(-1, 0)),
    "tiled PyTorch": lambda q, k, v: FlashAttention.apply(q, k, v, 0.125, True),
    "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "ours": lambda q, k, v: flash_attn_ext.scaled_dot_product_attention(q, k, v, is_causal=True),
}
lengths = [128, 256, 512, 1024, 2048]
kept = {name: [] for name in implementations}
for n in lengths:
    inputs = [torch.randn(1, 1, n, 64, device=device, requires_grad=True) for _ in range(3)]
    for name, attend in implementations.items():
        kept[name].append(saved_bytes(attend, *inputs) / 2**20)

_, axes = pyplot.subplots(figsize=(6.5, 3))
plots.against_length(axes, lengths, kept, "MiB kept for the backward, one head")
pyplot.show()
assert kept["naive"][-1] > 10 * kept["tiled PyTorch"][-1]

# %% [markdown]
# Slope 2 against slope 1: the red line quadruples with each doubling of $N$; the other three, one
# upon the other, double.
#
# One trap remains. **Dropout** drops random elements of $P$, and the backward has to drop the same
# ones, tile by tile, without having stored which. So in this project a number decides that depends
# on the *position* alone: any tile of the mask can be computed at any time, in any order, on any
# device (`csrc/dropout.h`, `series/dropout.py`).

# %%
state = torch.tensor([2024, 0], device=device)
whole = dropout.keep_mask(state, 0.1, 1, 1, range(128), range(128))
tile = dropout.keep_mask(state, 0.1, 1, 1, range(70, 100), range(33, 60))
assert torch.equal(tile, whole[:, :, 70:100, 33:60])
print(f"a tile on its own is the cut-out of the whole; {whole.float().mean().item():.1%} kept")

# %% [markdown]
# ## Step 7: the same loop, three times
#
# You have now written what runs in production, apart from speed. The code below is **quoted live**:
# when this notebook runs, it looks functions up by name in the sources beside it. First
# `flash_attn_ext/series/tiled.py`, which is your loop with every feature (masks, windows, dropout,
# grouped heads):

# %%
source = inspect.getsource(tiled.forward)
loop = source[source.index("    for rows in blocks") :]
quote.show(inspect.cleandoc("\n" + loop), "python")

# %% [markdown]
# Then C, for the CPU. `csrc/cpu/forward.inl` is compiled once for each dtype and instruction set;
# `T(x)` gives a function its name for the dtype, `V(x)` is a vector instruction. One task has one
# tile of queries, a few blocks of 64, and the keys pass by in tiles; this is what a block does with
# a tile of keys:

# %%
c_forward = quote.function("cpu/forward.inl", "attend")
quote.show(c_forward)

# %% [markdown]
# | you wrote | C says |
# |---|---|
# | `S = Q_i @ K_j.mT` | `gemm` into `S`; $S$ is transposed: a query is a lane of a vector |
# | `scale_and_mask` | `edit_scores`, only where a mask or the window touches the tile |
# | `m_new`, `P`, `l`, `rescale` | `online_softmax` |
# | `O_i * rescale` | `rescale_rows`, which skips rows whose maximum stayed |
# | `+ P @ V_j` | `gemm` into `O`; the `1` near its end says: add |
#
# `online_softmax` itself is your six lines, for 8 or 16 rows in one vector:

# %%
quote.show(quote.function("cpu/forward.inl", "online_softmax"))

# %% [markdown]
# And this is exercise 4, for threads that had some of the keys each. They hand over what is not yet
# divided by $l$, with $m$ and $l$ instead of `lse`:

# %%
quote.show(quote.function("cpu/forward.inl", "forward_merge"))

# %% [markdown]
# Now CUDA, for tensor cores. A *block* of threads owns a tile of queries, and each *warp* of 32
# threads owns some rows of it. $S$, $P$, $O$, $m$ and $l$ live in registers, $K$ and $V$ pass
# through shared memory. What is new is `cp_async`: while the tensor cores multiply, the next tile
# is already on its way. Look for the sentence you know: `multiply_scores`, mask, softmax,
# `multiply_values`.

# %%
cuda_forward = quote.loop("cuda/kernels/forward_sm80.cu", around="multiply_values")
quote.show(cuda_forward, "cpp")

# %% [markdown]
# Line by line, the names beside each other. (The cell looks each of them up in the quotations, so
# the table is not stale either.)


# %%
def side_by_side(rows, c, cuda):
    for _, in_c, in_cuda in rows:
        assert in_c in c, f"{in_c} is not in the C code above any more: update this table"
        assert in_cuda in cuda, f"{in_cuda} is not in the CUDA code above any more: update it"
    lines = [f"| {yours} | `{in_c}` | `{in_cuda}` |" for yours, in_c, in_cuda in rows]
    return Markdown("\n".join(["| you | C | CUDA |", "|---|---|---|", *lines]))


side_by_side(
    [
        ("$S = Q K^T$", "gemm", "multiply_scores"),
        ("scale and mask", "edit_scores", "finish_scores"),
        ("$m, l, P$ and the factor", "online_softmax", "softmax"),
        ("dropout", "draw_dropout", "drop"),
        ("$O$ times the factor", "rescale_rows", "softmax"),
        ("$O$ += $P V$", "gemm(block->O", "multiply_values"),
    ],
    c_forward,
    cuda_forward,
)

# %%
if quote.exists("cuda/kernels/forward_sm90.cu"):
    print("And once more for Hopper. TMA, a unit of its own, brings the tiles. The softmax of a")
    print("tile is computed while wgmma still multiplies the P of the one before with its V.")
    display(quote.show(quote.loop("cuda/kernels/forward_sm90.cu", around="multiply_values"), "cpp"))

# %% [markdown]
# The backward, in the same two languages. In C, one tile of queries against one tile of keys, with
# your five products:

# %%
c_backward = quote.function("cpu/backward.inl", "backward_tile")
quote.show(c_backward)

# %% [markdown]
# and the heart of its `softmax_backward`, $P = e^{S - \mathrm{lse}}$ and $dS = P\,(dP - \delta)$:

# %%
quote.show(quote.function("cpu/backward.inl", "probabilities_and_dS"))

# %% [markdown]
# In CUDA a block owns a tile of keys, and the queries pass by:

# %%
cuda_backward = quote.loop("cuda/kernels/backward_sm80.cu", around="multiply_rows")
quote.show(cuda_backward, "cpp")

# %%
side_by_side(
    [
        ("$S = Q K^T$ and $dP = dO V^T$", "gemm", "multiply_rows"),
        ("$P = e^{S - lse}$", "softmax_backward", "exponentiate"),
        ("$dS = P (dP - \\delta)$", "softmax_backward", "differentiate"),
        ("$dV$ += $P^T dO$", "gemm(tile->dV", "dV"),
        ("$dK$ += $dS^T Q$", "gemm(tile->dK", "dK"),
        ("$dQ$ += $dS K$", "gemm(dQ", "add_dq"),
    ],
    c_backward,
    cuda_backward,
)

# %% [markdown]
# ## Step 8: the speed ladder
#
# Same mathematics, forward and backward: the textbook, **your own code** ("tiled PyTorch"),
# PyTorch's SDPA, and our kernels. On a CPU the same C is compiled for several instruction sets, so
# that we can climb rung by rung: portable C, then vectors of 8 numbers (AVX2), then of 16
# (AVX-512). On a GPU our first rung has the instructions for tensor cores that every GPU since
# Ampere has, and on a Hopper there is one more: its own, `wgmma`, and its copy engine. All take
# turns, so that a busy machine slows all of them alike.

# %%
dtype = torch.float16 if device == "cuda" else torch.float32
heads, n, d = (16, 4096, 64) if device == "cuda" else (4, 1024, 64)
inputs = [
    torch.randn(1, heads, n, d, device=device, dtype=dtype).requires_grad_() for _ in range(3)
]
gradient = torch.randn(1, heads, n, d, device=device, dtype=dtype)
print(flash_attn_ext.explain(*inputs, is_causal=True))


def compiled_for(isa):
    def attend(q, k, v):
        _C.set_isa(isa)  # as FLASH_ATTN_EXT_ISA does; the backward runs before the next turn
        return flash_attn_ext.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def by_kernels(name):
    def attend(q, k, v):
        _C.cuda_set_kernels(name)  # as FLASH_ATTN_EXT_CUDA_KERNELS does
        return flash_attn_ext.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


best_isa = _C.isa()
rungs = dict(implementations)
if device == "cpu":
    del rungs["ours"]
    for isa in ("generic", "avx2", "avx512"):
        if (isa, True) in _C.isa_list():
            rungs[f"ours, {isa}"] = compiled_for(isa)
elif torch.cuda.get_device_capability() == (9, 0):
    del rungs["ours"]
    rungs["ours, tensor cores"] = by_kernels("portable")
    rungs["ours, Hopper"] = by_kernels("best")


def both_ways(attend):
    return lambda: torch.autograd.grad(attend(*inputs), inputs, gradient)


reference = both_ways(rungs["naive"])()
for attend in rungs.values():  # checked before it is timed
    for result, expected in zip(both_ways(attend)(), reference):
        assert (result - expected).abs().max() < 0.02 * expected.abs().max()

threads = torch.get_num_threads()
torch.set_num_threads(1)  # a single one is disturbed least by what else runs here
calls = {name: both_ways(attend) for name, attend in rungs.items()}
samples = take_turns(calls, device=device, seconds=8)
_C.set_isa(best_isa)
_C.cuda_set_kernels("best")
torch.set_num_threads(threads)
_, axes = pyplot.subplots(figsize=(7.5, 2.8))
plots.ladder(axes, {name: sample.best for name, sample in samples.items()}, base="naive")
axes.set_title(f"forward + backward, {heads} heads, N = {n}, d = {d}, causal, {device}")
pyplot.show()

# %% [markdown]
# Tiling in Python saves memory first of all: each tile costs a dozen calls, and each of them goes
# over the tile again. In C the tile stays in the cache from the first product to the last. What is
# left is arithmetic, and now it pays to be good at it: from portable C to vectors, the same loop
# gains more than everything before.
#
# Further rungs need a GPU. Here is what has been recorded on one. First the attention of GPT-2
# medium, forward and backward, with the shapes of the paper's table (`make paper`), where an A100
# took 41.7 ms for the textbook and 7.3 ms for the first FlashAttention.


# %%
def recorded(benchmark):
    """What was measured on a GPU, with the name of each: its cells."""
    for path in sorted(Path("../benchmarks/results").glob(f"{benchmark}_*.json")):
        record = json.loads(path.read_text())
        if "device" in record:
            yield record["device"], record["cells"]


def draw_record(seconds, base, title):
    label = {"naive": "naive", "ours": "ours"}  # and the rest are backends of SDPA
    times = {label.get(name, f"SDPA: {name}"): value for name, value in seconds.items()}
    _, axes = pyplot.subplots(figsize=(7.5, 2.2))
    plots.ladder(axes, dict(sorted(times.items(), key=lambda item: -item[1])), base=base)
    axes.set_title(title)
    pyplot.show()


for gpu, cells in recorded("paper"):
    for cell in cells:
        if cell["feature"] == "gpt2":
            medians = {name: s["median"] for name, s in cell["seconds"].items()}
            draw_record(medians, "naive", f"{gpu}: GPT-2 medium, B = {cell['batch']}, float16")

# %% [markdown]
# `efficient` and `flash` are backends of SDPA; `flash` is FlashAttention-2, on tensor cores by the
# instructions of 2020, like our `forward_sm80.cu` and `backward_sm80.cu`. The rung above them is
# Hopper: `wgmma`, which multiplies whole tiles straight out of shared memory, and TMA, which brings
# them there (`forward_sm90.cu`, quoted above). The forward alone, without dropout, shows what it is
# worth (`make bench-gpu`):

# %%
for gpu, cells in recorded("gpu"):
    for cell in cells:
        shape = [cell[name] for name in ("feature", "head_dim", "length", "causal")]
        if shape == ["plain", 128, 4096, False]:
            for way in ("forward", "backward"):
                peers = cell[way]["hot"]
                medians = {name: peer["seconds"]["median"] for name, peer in peers.items()}
                draw_record(medians, "SDPA: flash", f"{gpu}: {way}, d = 128, N = 4096, bfloat16")
                rates = [f"{name} {peer['tflops']:.0f}" for name, peer in peers.items()]
                print(f"{way}, TFLOP/s: {', '.join(rates)}")

# %% [markdown]
# In both pictures a longer bar above ours is a gap that is still to be closed: what has been tried,
# and what it brought, is in `docs/performance.md`.
#
# ## Where to go from here
#
# * `docs/design.md`: the way through the code, from the Python call to the registers.
# * `csrc/cpu/gemm.inl`: the product that makes the tile worth having. `csrc/cuda/kernels/tile.cuh`:
#   how a tile lies in shared memory so that no two threads get in each other's way.
# * `docs/performance.md`: what each change for speed was expected to bring, and brought.
# * The papers: [FlashAttention](https://arxiv.org/abs/2205.14135),
#   [FlashAttention-2](https://arxiv.org/abs/2307.08691), [online
#   softmax](https://arxiv.org/abs/1805.02867).
#
# ## Solutions


# %%
def solved_merge(m1, l1, m2, l2):
    m = torch.maximum(m1, m2)
    return m, l1 * torch.exp(m1 - m) + l2 * torch.exp(m2 - m)


exercises.merge(solved_merge)


# %%
def solved_online_step(m, l, O, S, V):
    m_new = torch.maximum(m, S.amax(dim=1, keepdim=True))
    P = torch.exp(S - m_new)
    rescale = torch.exp(m - m_new)
    return m_new, l * rescale + P.sum(dim=1, keepdim=True), O * rescale + P @ V


exercises.online_step(solved_online_step)


# %%
def solved_can_skip(rows, cols):
    return cols[0] > rows[-1]


exercises.can_skip(solved_can_skip)


# %%
def solved_merge_outputs(O1, lse1, O2, lse2):
    lse = torch.logaddexp(lse1, lse2)
    return torch.exp(lse1 - lse) * O1 + torch.exp(lse2 - lse) * O2, lse


exercises.merge_outputs(solved_merge_outputs)


# %%
def solved_softmax_backward(P, dP, O, dO):
    delta = (dO * O).sum(dim=1, keepdim=True)
    return P * (dP - delta)


exercises.softmax_backward(solved_softmax_backward)
