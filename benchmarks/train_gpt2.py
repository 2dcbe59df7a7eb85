"""GPT-2 of `transformers`, trained as it is and with ours enabled: tokens/s and losses.

Both models begin with the same weights, see the same batches and take turns, some steps at a time,
in one process. The text is the source code of Python's standard library, a token a byte: nothing is
downloaded, and the sizes are GPT-2's. No dropout, for it would make the losses differ; bfloat16 by
autocast on a GPU. Needs `pip install transformers`. `report.py` makes a table and a picture of it.
"""

import argparse
import sysconfig
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from record import RESULTS, cuda_facts, facts, merge, save
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import flash_attn_ext
from flash_attn_ext.measure import Samples

SIZES = {
    "small": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
}
ATTENTIONS = {"sdpa": nullcontext, "ours": flash_attn_ext.enabled}


def standard_library(tokens: int) -> Tensor:
    """Bytes, [tokens]."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= tokens:
            break
    return torch.tensor(list(text[:tokens]))


class Trainer:
    """A model and its optimizer; `steps` trains on some batches."""

    def __init__(self, size: str, attention: str, options: argparse.Namespace):
        torch.manual_seed(0)
        no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        config = GPT2Config(**SIZES[size], **no_dropout, n_positions=options.context)
        config._attn_implementation = "sdpa"
        self.model = GPT2LMHeadModel(config).to(options.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 3e-4, betas=(0.9, 0.95))
        self.attention = ATTENTIONS[attention]
        self.autocast = partial(
            torch.autocast, options.device, torch.bfloat16, enabled=options.device == "cuda"
        )

    def steps(self, batches: Tensor) -> tuple[list[float], float]:
        """Of [steps, B, N] tokens; the losses in nats and the seconds that all of it took."""
        start, losses = time.perf_counter(), []
        with self.attention():
            for ids in batches:
                with self.autocast():
                    loss = self.model(ids, labels=ids).loss
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                losses.append(loss.detach())
        return torch.stack(losses).tolist(), time.perf_counter() - start  # tolist waits for the GPU


def train(size: str, batch: int, options: argparse.Namespace) -> dict:
    text = standard_library(4_000_000)
    start = torch.randint(len(text) - options.context, (options.steps, batch, 1))
    batches = text[start + torch.arange(options.context)].to(options.device)  # [steps, B, N]
    for name in ATTENTIONS:  # what a first step loads and compiles is no attention's cost
        Trainer(size, name, options).steps(batches[:1])

    trainers = {name: Trainer(size, name, options) for name in ATTENTIONS}
    losses, rates = ({name: [] for name in trainers} for _ in range(2))
    names = list(trainers)
    for turn in tqdm(batches.split(options.turn), desc=f"GPT-2 {size}", unit="turn"):
        for name in names:
            mine, seconds = trainers[name].steps(turn)
            losses[name] += mine
            rates[name].append(turn.numel() / seconds)
        names.append(names.pop(0))
    rates = {name: Samples(mine) for name, mine in rates.items()}
    return {
        "losses": losses,
        "tokens_per_second": {name: mine.summary for name, mine in rates.items()},
        "speedup": (rates["ours"] / rates["sdpa"]).summary,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if has_gpu else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turn", type=int, default=5, help="steps of one, then of the other")
    parser.add_argument("--tokens", type=int, default=16384, help="of a batch")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a text, N")
    parser.add_argument("--commit", help="of the code, where there is no git repository")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()

    record = facts() | (cuda_facts() if options.device == "cuda" else {})
    record["commit"] = options.commit or record["commit"]
    stamp = {name: record[name] for name in ("commit", "date")}
    record["cells"] = []
    for size in options.sizes:
        batch = options.tokens // options.context
        cell = {"model": size, "batch": batch, "length": options.context}
        cell |= train(size, batch, options)
        per_second = {name: s["median"] for name, s in cell["tokens_per_second"].items()}
        apart = max(abs(a - b) for a, b in zip(*cell["losses"].values()))
        print(f"GPT-2 {size}: {per_second}, speedup {cell['speedup']['median']:.3f}, "
              f"last loss {cell['losses']['ours'][-1]:.3f}, apart at most {apart:.1e}")  # fmt: skip
        record["cells"].append(cell | stamp)
    measured = {"losses", "tokens_per_second", "speedup"}
    save("train", merge("train", record, options.out, measured), options.out)


if __name__ == "__main__":
    main()
