"""Train a small Mamba-2 teacher on any text; writes a folder in the layout of Hugging Face.

python examples/01_train_teacher.py --data stories.txt books/ -o teacher
"""

import os
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from corpus import END_OF_TEXT, load_tokenizer, perplexity, read_corpus
from training import Schedule, bf16_is_faster, train

from dfssm.model.config import Mamba2Config
from dfssm.model.hf_import import load_teacher, save_teacher
from dfssm.model.teacher import Mamba2LM
from dfssm.opset.errors import DfssmError


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="A text file, or a folder of *.txt; may be repeated. <|endoftext|> separates documents.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default="teacher", show_default=True)
@click.option("--resume", is_flag=True, help="Go on from OUTPUT/training.pt.")
@click.option("--vocab-size", default=4096, show_default=True, help="Of the tokenizer that is trained.")
@click.option("--d-model", default=256, show_default=True)
@click.option("--layers", default=6, show_default=True)
@click.option("--d-state", default=64, show_default=True)
@click.option("--headdim", default=64, show_default=True)
@click.option("--steps", default=3000, show_default=True)
@click.option("--batch", default=8, show_default=True, help="Windows a step.")
@click.option("--tokens", default=256, show_default=True, help="Tokens a window.")
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--held-out", default=0.02, show_default=True, help="Last share of each file, for perplexity.")
@click.option("--save-every", default=200, show_default=True, help="Steps between checkpoints.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=False,
    show_default=True,
    help="torch.compile the blocks: minutes to begin, then about 1.4x faster.",
)
def main(
    data,
    output,
    resume,
    vocab_size,
    d_model,
    layers,
    d_state,
    headdim,
    steps,
    batch,
    tokens,
    lr,
    held_out,
    save_every,
    seed,
    threads,
    compiled,
):
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "tokenizer.json"
    tokenizer = load_tokenizer(file) if resume else None
    corpus, tokenizer = read_corpus(list(data), held_out, tokenizer, vocab_size)
    if not resume:
        tokenizer.save(str(file))
    end = tokenizer.token_to_id(END_OF_TEXT)
    # The table is a whole number of 32 rows, as the published checkpoints pad theirs.
    model = Mamba2LM(
        Mamba2Config(
            vocab_size=-(-tokenizer.get_vocab_size() // 32) * 32,
            d_model=d_model,
            n_layer=layers,
            d_state=d_state,
            headdim=headdim,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    bf16 = bf16_is_faster()
    click.echo(
        f"{len(corpus.train):,} training and {len(corpus.held_out):,} held-out tokens, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {threads} threads, "
        f"{'bf16' if bf16 else 'fp32'} products"
    )
    if compiled:
        for layer in model.layers:
            layer.compile()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(ids[:, :-1])[0]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    schedule = Schedule(
        steps=steps,
        batch=batch,
        tokens=tokens,
        lr=lr,
        warmup=min(100, steps // 10 + 1),
        save_every=save_every,
        seed=seed,
    )
    report = train(model, loss, corpus, schedule, output / "training.pt", resume)
    save_teacher(model, output)
    saved = load_teacher(output).eval()
    held = perplexity(lambda ids: saved(ids)[0], corpus.held_out, tokens)
    click.echo(
        f"{report['tokens']:,} tokens in {report['seconds']:.0f} s; held-out perplexity {held:.2f}; wrote {output}"
    )


if __name__ == "__main__":
    try:
        main()
    except DfssmError as error:
        raise SystemExit(f"error: {error}") from None
