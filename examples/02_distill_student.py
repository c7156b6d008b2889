"""Distil a 1-bit student from the teacher of 01_train_teacher.py, in the arithmetic that ships.

python examples/02_distill_student.py --teacher teacher --data stories.txt books/ -o student

Every forward pass is the deployed one: sign scaffold, int8 activations, int8 low rank, int8 embedding and
head. The student starts at the data-free conversion (sign, row mean, SVD of the residual); all of it is then
trained to give the teacher's distribution of the next token.
"""

import json
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from corpus import load_tokenizer, perplexity, read_corpus
from options import Run, main, run_options
from tokenizers import Tokenizer
from training import bf16_is_faster, train

from dfssm.model.checkpoint import save_student
from dfssm.model.convert import convert, student_from_teacher
from dfssm.model.hf_import import load_teacher
from dfssm.model.student import DFSSMLM, from_tensors, load_student


@torch.no_grad()
def sample(
    model: DFSSMLM, tokenizer: Tokenizer, prompt: str, seed: int, tokens: int = 120, temperature: float = 0.7
) -> str:
    """Continue `prompt` token by token, as the runtime does."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    logits, state = model(torch.tensor([ids]), logits_to_keep=1)
    for _ in range(tokens):
        probabilities = torch.softmax(logits[0, -1] / temperature, dim=-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if ids[-1] == model.config.eos_token_id:
            break
        logits, state = model(torch.tensor([ids[-1:]]), state)
    return tokenizer.decode(ids)


@click.command()
@run_options(output="student", steps=1500, seed=1)
@click.option("--teacher", "teacher_folder", type=click.Path(path_type=Path), default="teacher", show_default=True)
@click.option("--rank", default=2, show_default=True, help="Of the int8 correction; about 1/100 of d_model.")
@click.option("--prompt", default="Once upon a time", show_default=True, help="Of the sample at the end.")
def distill_student(run: Run, teacher_folder: Path, rank: int, prompt: str):
    run.begin()
    teacher = load_teacher(teacher_folder).requires_grad_(False).eval()
    corpus, tokenizer = read_corpus(list(run.data), run.held_out, load_tokenizer(teacher_folder / "tokenizer.json"))
    student = student_from_teacher(teacher, rank)
    models = {"teacher": teacher, "data_free": from_tensors(*convert(teacher, rank))}
    perplexities = {
        name: perplexity(lambda ids, m=model: m(ids)[0], corpus.held_out, run.tokens) for name, model in models.items()
    }
    bf16 = bf16_is_faster()
    click.echo(
        f"{len(corpus.train):,} training and {len(corpus.held_out):,} held-out tokens, rank {rank}, "
        f"{run.threads} threads, {'bf16' if bf16 else 'fp32'} gradients; perplexity of the teacher "
        f"{perplexities['teacher']:.2f}, of its data-free conversion {perplexities['data_free']:.2f}"
    )
    if run.compiled:
        for layer in [*teacher.layers, *student.layers]:
            layer.compile()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        """Kullback-Leibler divergence from the teacher's next-token distribution, in nats a token."""
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                target = F.log_softmax(teacher(ids[:, :-1])[0].float(), dim=-1)
            logits = F.log_softmax(student(ids[:, :-1])[0].float(), dim=-1)
        return F.kl_div(logits.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")

    # No decay: a latent's size is its distance from flipping, not the size of a weight.
    report = train(student, loss, corpus, run.schedule(weight_decay=0.0), run.checkpoint, run.resume)

    save_student(run.output / "model.pt", student.config, student.eval().export_tensors())
    tokenizer.save(str(run.output / "tokenizer.json"))
    shipped = load_student(run.output / "model.pt")
    report["perplexity"] = perplexities | {
        "student": perplexity(lambda ids: shipped(ids)[0], corpus.held_out, run.tokens)
    }
    report["sample"] = sample(shipped, tokenizer, prompt, run.seed)
    (run.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(distill_student)
