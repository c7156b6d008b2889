"""Train a small Mamba-2 teacher on any text; writes a folder in the layout of Hugging Face.

python examples/01_train_teacher.py --data stories.txt books/ -o teacher
"""

import click
import torch
import torch.nn.functional as F
from corpus import END_OF_TEXT, load_tokenizer, perplexity, read_corpus
from options import Run, main, run_options
from training import bf16_is_faster, train

from dfssm.model.config import Mamba2Config
from dfssm.model.hf_import import load_teacher, save_teacher
from dfssm.model.teacher import Mamba2LM


@click.command()
@run_options(output="teacher", steps=3000, seed=0)
@click.option("--vocab-size", default=4096, show_default=True, help="Of the tokenizer that is trained.")
@click.option("--d-model", default=256, show_default=True)
@click.option("--layers", default=6, show_default=True)
@click.option("--d-state", default=64, show_default=True)
@click.option("--headdim", default=64, show_default=True)
def train_teacher(run: Run, vocab_size: int, d_model: int, layers: int, d_state: int, headdim: int):
    run.begin()
    file = run.output / "tokenizer.json"
    tokenizer = load_tokenizer(file) if run.resume else None
    corpus, tokenizer = read_corpus(list(run.data), run.held_out, tokenizer, vocab_size)
    if not run.resume:
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
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {run.threads} threads, "
        f"{'bf16' if bf16 else 'fp32'} products"
    )
    if run.compiled:
        for layer in model.layers:
            layer.compile()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(ids[:, :-1])[0]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    report = train(model, loss, corpus, run.schedule(), run.checkpoint, run.resume)
    save_teacher(model, run.output)
    saved = load_teacher(run.output).eval()
    held = perplexity(lambda ids: saved(ids)[0], corpus.held_out, run.tokens)
    click.echo(
        f"{report['tokens']:,} tokens in {report['seconds']:.0f} s; held-out perplexity {held:.2f}; wrote {run.output}"
    )


if __name__ == "__main__":
    main(train_teacher)
