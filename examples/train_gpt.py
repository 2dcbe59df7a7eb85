"""Trains a small character-level GPT with three attentions, and compares what each costs.

    naive    softmax(Q K^T) V spelled out, which stores the N x N matrix
    sdpa     PyTorch's torch.nn.functional.scaled_dot_product_attention
    ours     flash_attn_ext.scaled_dot_product_attention

The text is the source code of Python's own standard library, so nothing is downloaded. All three
start from the same weights and see the same batches: their losses agree up to rounding. Each one
trains in a process of its own, so that its peak of memory is its own.
"""

import argparse
import math
import multiprocessing
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import trange

import flash_attn_ext
from flash_attn_ext.measure import PeakMemory
from flash_attn_ext.series import naive

ATTENTIONS = {
    "naive": lambda q, k, v: naive.attention(q, k, v, scale=q.shape[-1] ** -0.5, window=(-1, 0)),
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "ours": lambda q, k, v: flash_attn_ext.scaled_dot_product_attention(q, k, v, is_causal=True),
}
VOCABULARY = 128  # ASCII


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, attention):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        o = self.attention(q, k, v)  # [B, H, N, D]
        return self.project(o.transpose(1, 2).flatten(-2))  # [B, N, H * D]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attention):
        super().__init__()
        self.attention = Attention(width, heads, attention)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C] -> [B, N, C]
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, context: int, layers: int, heads: int, head_dim: int, attention):
        super().__init__()
        width = heads * head_dim
        self.context = context
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, attention) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.positions.weight, std=0.02)
        nn.init.normal_(self.characters.weight, std=0.02)
        for block in self.blocks:  # as in GPT-2: what joins the residual stream starts small
            for layer in (block.attention.project, block.mlp[-1]):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, ids: Tensor) -> Tensor:  # [B, N]
        x = self.characters(ids) + self.positions.weight[: ids.shape[1]]  # [B, N, C]
        x = self.norm(self.blocks(x))
        return x @ self.characters.weight.T  # [B, N, VOCABULARY]

    @torch.no_grad()
    def generate(self, prompt: str, length: int) -> str:
        ids = encode(prompt).to(self.characters.weight.device)[None]  # [1, N]
        for _ in range(length):
            logits = self(ids[:, -self.context :])[:, -1].float()  # [1, VOCABULARY]
            following = torch.multinomial(torch.softmax(logits / 0.7, dim=-1), 1)
            ids = torch.cat([ids, following], dim=1)
        return bytes(ids[0].tolist()).decode("ascii")


def encode(text: str) -> Tensor:
    return torch.tensor(list(text.encode("ascii", "replace")))


def standard_library(characters: int = 2_000_000) -> str:
    """The first so many characters of the standard library's top-level modules, by name."""
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace").replace("\f", "")
        if len(text) >= characters:
            break
    return text[:characters]


def learning_rate(step: int, steps: int) -> float:
    """As a part of the highest: a linear warm-up, then half a cosine down to a tenth."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))


class Trainer:
    """A model and its optimizer; `step` is one step of the training."""

    def __init__(self, name: str, device: str, options: argparse.Namespace):
        self.model = GPT(
            options.context, options.layers, options.heads, options.head_dim, ATTENTIONS[name]
        ).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.lr, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate(step, options.steps)
        )
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")

    def step(self, ids: Tensor) -> float:
        """Of [B, N + 1] characters; returns the loss in nats."""
        with self.autocast():
            logits = self.model(ids[:, :-1])  # [B, N, VOCABULARY]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.item()  # waits for the device


def train(name: str, device: str, options: argparse.Namespace) -> dict:
    """Trains one model; returns its losses, its speed and its peak of memory."""
    text = encode(standard_library())
    windows = text.unfold(0, options.context + 1, 1)  # [characters, N + 1], a view
    # What a first step loads and compiles is no attention's cost.
    Trainer(name, device, options).step(windows[:1, :17].to(device))

    torch.manual_seed(options.seed)
    order = torch.randint(len(windows), (options.steps, options.batch))
    with PeakMemory(device) as memory:
        trainer = Trainer(name, device, options)
        losses, seconds = [], []
        progress = trange(options.steps, desc=f"{name:5}", unit="step")
        for step in progress:
            start = time.perf_counter()
            losses.append(trainer.step(windows[order[step]].to(device)))
            seconds.append(time.perf_counter() - start)
            progress.set_postfix(loss=f"{losses[-1]:.3f}")

    seconds.sort()
    with trainer.autocast():
        sample = trainer.model.generate("def ", 200)
    return {
        "losses": losses,
        "tokens_per_second": options.batch * options.context / seconds[len(seconds) // 2],
        "megabytes": memory.bytes / 2**20,
        "sample": sample,
    }


def pick_device() -> str:
    """The GPU where there is one and our kernels run on it, else the CPU."""
    if torch.cuda.is_available():
        q = torch.empty(1, 1, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        if flash_attn_ext.explain(q, q, q, is_causal=True).kernel != "tiled":
            return "cuda"
    return "cpu"


def plot(results: dict[str, dict], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, speed, memory) = pyplot.subplots(
        1, 3, figsize=(11, 3.4), width_ratios=(2, 1, 1), layout="constrained"
    )
    colors = dict(zip(results, ("tab:gray", "tab:blue", "tab:orange"), strict=True))
    for width, (name, result) in zip((6, 3.5, 1.2), results.items(), strict=True):
        curves.plot(result["losses"], label=name, color=colors[name], linewidth=width)
    curves.set(title="training loss: one curve, three times", xlabel="step", ylabel="nats")
    curves.legend()
    for axes, key, title in (
        (speed, "tokens_per_second", "tokens/s"),
        (memory, "megabytes", "peak memory, MiB"),
    ):
        bars = axes.bar(results.keys(), [r[key] for r in results.values()], color=colors.values())
        axes.bar_label(bars, fmt="{:,.0f}")
        axes.set_title(title)
        axes.margins(y=0.12)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024, help="characters, N")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("demo.png"))
    options = parser.parse_args()

    device = pick_device()
    spawn = multiprocessing.get_context("spawn")
    results = {}
    for name in ATTENTIONS:
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            results[name] = process.submit(train, name, device, options).result()

    rows = [
        (name, r["losses"][-1], r["tokens_per_second"], r["megabytes"])
        for name, r in results.items()
    ]
    print(f"\n{options.steps} steps of {options.batch} x {options.context} characters, {device}\n")
    print(
        tabulate(
            rows,
            headers=["attention", "loss", "tokens/s", "peak memory, MiB"],
            floatfmt=("", ".4f", ",.0f", ",.0f"),
        )
    )
    losses = torch.tensor([r["losses"] for r in results.values()])  # [3, steps]
    difference = (losses.amax(0) - losses.amin(0)).max().item()
    print(f"\nLargest difference between the three losses at any step: {difference:.1e}")
    plot(results, options.plot)
    print(f"Plot: {options.plot}\n\nWhat the model trained with our attention writes:\n")
    print(results["ours"]["sample"])

    # Rounding differs from one attention to the next, and training amplifies it a little.
    tolerance = 1e-2 if device == "cpu" else 5e-2
    if not difference < tolerance:
        raise SystemExit(f"The three losses differ by more than {tolerance}: a bug.")


if __name__ == "__main__":
    main()
