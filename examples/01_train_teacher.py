"""Train a small Mamba-2 teacher on any text until its held-out loss stops falling; writes the layout of Hugging Face.

python examples/01_train_teacher.py --data stories.txt --data books/ -o teacher
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import click

from dfssm.base.errors import DfssmError
from dfssm.base.extras import lacking, require
from dfssm.cli.options import SEED, THREADS, real, whole
from dfssm.cli.process import run
from dfssm.distill import PACKAGES

if message := lacking(PACKAGES):  # torch, which is imported next
    raise SystemExit(f"{Path(__file__).name}: error: {message}")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from dfssm.base import paths
from dfssm.base.endings import END_OF_TEXT
from dfssm.base.files import write_file
from dfssm.distill.data import Windows, tokenize
from dfssm.distill.distributed import Ranks
from dfssm.distill.held_out import cut_windows, figures
from dfssm.distill.trainer import Schedule, Trainer, fast_bf16
from dfssm.distill.vocabulary import beginnings, train_tokenizer
from dfssm.model.config import Mamba2Config
from dfssm.model.hf_import import load_teacher, save_teacher
from dfssm.model.teacher import Mamba2LM
from dfssm.model.text import packages, text_files
from dfssm.targets.text import load_tokenizer

WEIGHT_DECAY = 0.1
PATIENCE = 3  # measurements without a new best, and the loss has stopped falling
LEAST = 1e-3  # nats a token: what is less below the best is no new best


class Plateau:
    """Learning rate `lr` until the held-out loss stops falling, then over a quarter of the steps so far down to zero.

    It rises over the first `warmup` steps. At step `longest` the loss is taken to have stopped.
    """

    def __init__(self, lr: float, warmup: int, longest: int):
        self.lr, self.warmup, self.turn = lr, warmup, longest
        self.best, self.worse = math.inf, 0

    def measured(self, step: int, loss: float) -> None:
        """Take note of the held-out loss after `step` steps."""
        if step >= self.turn:
            return
        if loss < self.best - LEAST:
            self.best, self.worse = loss, 0
        else:
            self.worse += 1
        if self.worse == PATIENCE:
            self.turn = step

    def steps(self) -> int:
        """Of the whole run, as far as is known by now."""
        return self.turn + max(1, self.turn // 4)

    def rate(self, step: int) -> float:
        if step < self.turn:
            return self.lr * min(1.0, (step + 1) / self.warmup)
        return self.lr * (self.steps() - step) / (self.steps() - self.turn)


class NextToken(nn.Module):
    """A language model as the trainer calls it: ids i64[B,T+1] -> the mean cross entropy of the next token."""

    def __init__(self, model: Mamba2LM):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        logits = self.model(ids[:, :-1])[0]
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())}


def read_tokenizer(file: Path) -> Tokenizer:
    tokenizer = load_tokenizer(file, "another or none")
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DfssmError(f"{file}: has no token {END_OF_TEXT}; give another or none")
    return tokenizer


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, multiple=True, type=click.Path(), metavar="PATH",
              help="Training text: text, JSON lines or parquet files, or a folder of them. Repeatable.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(), default="teacher", metavar="DIR", help="Folder to write to.")
@click.option("--tokenizer", type=click.Path(), metavar="FILE", help="Use this tokenizer.json; else one is trained.")
@click.option("--vocab-size", type=whole(257, 2**20), default=4096, help="Tokens of a trained tokenizer.")
@click.option("--d-model", type=whole(32, 2**16), default=256, help="Width of the model.")
@click.option("--layers", type=whole(1, 1024), default=6, help="Number of layers.")
@click.option("--d-state", type=whole(1, 1024), default=64, help="State size of each channel.")
@click.option("--headdim", type=whole(1, 2**16), default=64, help="Channels of a head.")
@click.option("--longest", type=whole(1), default=6000, help="Most steps at the full learning rate.")
@click.option("--warmup", type=whole(1), default=100, help="Steps over which the learning rate rises.")
@click.option("--batch", type=whole(1, 2**20), default=8, help="Windows per step.")
@click.option("--tokens", type=whole(2, 2**20), default=256, help="Tokens in a window.")
@click.option("--lr", type=real(1e-12, 1_000), default=2e-3, help="Peak learning rate.")
@click.option("--held-out", type=real(0, 0.5), default=0.02, help="Share of each file, from its end, that is held out.")
@click.option("--every", type=whole(1), default=200, help="Steps from one held-out loss and checkpoint to the next.")
@click.option("--seed", type=SEED, default=0, help="Random seed.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="PyTorch device: cpu or cuda.")
@click.option("--threads", type=THREADS, default=os.cpu_count(), help="CPU threads.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the layers with torch.compile.")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in DIR.")
def train_teacher(data, output, tokenizer, vocab_size, device, threads, compiled, resume, **options):
    """Train a small Mamba-2 teacher until its held-out loss stops falling."""
    require({"": packages(text_files(data))})
    output = paths.output_folder(output)
    if tokenizer is not None:
        tokenizer = paths.file(tokenizer, "a tokenizer.json", "tokenizer.json")
    torch.set_num_threads(threads)
    torch.manual_seed(options["seed"])
    ranks, tokens, held_out = Ranks(0, 1, torch.device(device)), options["tokens"], options["held_out"]
    checkpoints = output / "checkpoints"
    if not resume and checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise DfssmError(f"{output}: holds a run already; go on with --resume, or choose another folder")
    kept = output / "tokenizer.json"
    given = kept if resume and kept.is_file() else tokenizer
    tokenizer = read_tokenizer(given) if given else train_tokenizer(beginnings(data, held_out), vocab_size)
    write_file(kept, tokenizer.to_str(), parents=True)
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = Mamba2Config(
        vocab_size=-(-tokenizer.get_vocab_size() // 32) * 32,  # padded as that of the published checkpoints
        d_model=options["d_model"],
        n_layer=options["layers"],
        d_state=options["d_state"],
        headdim=options["headdim"],
        bos_token_id=end,
        eos_token_id=end,
    )
    text = tokenize(data, tokenizer, end, config.vocab_size, held_out, output / "tokens", tokens)
    windows = cut_windows(text.held_out, tokens)
    if not len(windows):
        need = f"a window of {tokens:,} needs {tokens + 1:,}"
        raise DfssmError(f"{len(text.held_out):,} tokens are held out, {need}; give more --data or --held-out")
    model = NextToken(Mamba2LM(config)).to(ranks.device)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    plateau = Plateau(options["lr"], options["warmup"], options["longest"])

    def measure() -> dict[str, float]:
        found = figures(model.model, None, windows, ranks)
        plateau.measured(trainer.step, found["held_out"])
        return found

    trainer = Trainer(
        model,
        {"all": list(model.parameters())},
        lambda progress: {"all": plateau.rate(trainer.step)},
        Windows(text.train, tokens, options["seed"]),
        Schedule(
            steps=plateau.steps(),
            batch=options["batch"],
            micro_batch=options["batch"],
            tokens=tokens,
            save_every=options["every"],
            evaluate_every=options["every"],
        ),
        ranks,
        output,
        held_out=measure,
        ends=plateau.steps,
        weight_decay=WEIGHT_DECAY,
        bf16=fast_bf16(ranks.device),
        identity=options | {"data": list(map(str, data))},
    )
    if resume and not trainer.resume():
        raise DfssmError(f"{checkpoints}: nothing to resume from; leave out --resume to begin")
    if resume:
        for line in map(json.loads, trainer.log.path.read_text().splitlines()):
            if "held_out" in line:
                plateau.measured(line["step"], line["held_out"])
    click.echo(
        f"{len(text.train):,} training and {len(text.held_out):,} held-out tokens, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {'bf16' if trainer.bf16 else 'fp32'} products"
    )
    trainer.train()
    save_teacher(model.model, output)
    perplexity = figures(load_teacher(output).to(ranks.device), None, windows, ranks)["perplexity"]
    click.echo(
        f"{trainer.step:,} steps, {trainer.step * options['batch'] * tokens:,} tokens in {trainer.seconds:.0f} s; "
        f"held-out perplexity {perplexity:.2f}; wrote {output}"
    )


if __name__ == "__main__":
    run(train_teacher, Path(__file__).name)
