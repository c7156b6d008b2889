"""What the harness's own model type `hf` makes of a teacher's folder, is what ours makes of it."""

import json

import numpy as np
import pytest
import tiny
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dfssm[eval]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'dfssm[dev]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'dfssm[dev]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from dfssm.base import DfssmError  # noqa: E402
from dfssm.eval.harness import DfssmLM  # noqa: E402
from dfssm.model.config import Mamba2Config  # noqa: E402
from dfssm.model.hf_import import save_teacher  # noqa: E402
from dfssm.model.teacher import Mamba2LM  # noqa: E402

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}\n"
    "[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PAIRS = [
    *(("hello world", " hello"), ("hello world", " world é"), ("", "hello"), ("hello ", "world"), ("hé", "llo 日本")),
    *(("hello world hello", " w"), ("hello world", " who would"), ("{begin}hello", " world")),
]
TEXTS = ["hello world", "é" * 40, "a", "{begin}hello", "Once upon\n\na time 日本語"]


@pytest.fixture(scope="module", params=["neox", "llama"])
def folder(request, tmp_path_factory):
    """A random teacher with a tokenizer as GPT-NeoX's, which begins a text with nothing, or as Llama's, with <s>."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    shape = dict(vocab_size=265, d_model=32, n_layer=2, d_state=8, headdim=8)
    end = {"neox": 264, "llama": 263}[request.param]
    model = Mamba2LM(Mamba2Config(**shape, eos_token_id=end)).requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    save_teacher(model, folder)
    if request.param == "neox":
        tiny.write_tokenizer(folder / "tokenizer.json")
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace("<|end|>", "<|endoftext|>"))
        names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    else:
        tiny.byte_fallback_tokenizer().save(str(folder / "tokenizer.json"))
        names = {"bos_token": "<s>", "eos_token": "</s>"}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module", params=[None, True, False], ids=["bos None", "bos True", "bos False"])
def both(request, folder):
    """(theirs, ours) with one `add_bos_token`."""
    model = transformers.Mamba2ForCausalLM.from_pretrained(folder).eval()
    theirs = HFLM(pretrained=model, tokenizer=str(folder), batch_size=1, add_bos_token=request.param)
    return theirs, DfssmLM(folder, batch_size=3, **({} if request.param is None else {"add_bos_token": request.param}))


def requests(kind, model, arguments):
    begin = model.scorer.tokenizer.decode([model.prefix_token_id], skip_special_tokens=False)
    filled = [tuple(a.replace("{begin}", begin) if isinstance(a, str) else a for a in row) for row in arguments]
    return [Instance(kind, {}, row, index) for index, row in enumerate(filled)]


def test_tokens_are_the_same(both):
    theirs, ours = both
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    for text in [*TEXTS, *(a + b for a, b in PAIRS)]:
        text = text.replace("{begin}", theirs.tokenizer.decode(theirs.prefix_token_id))
        for special in (None, True, False):
            found = ours.tok_encode(text, add_special_tokens=special)
            assert found == theirs.tok_encode(text, add_special_tokens=special), (text, special)


def test_loglikelihoods_are_the_same(both):
    theirs, ours = both
    asked = requests("loglikelihood", ours, PAIRS)
    found, expected = ours.loglikelihood(asked, True), theirs.loglikelihood(asked, True)
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_loglikelihoods_are_the_same(both):
    theirs, ours = both
    asked = requests("loglikelihood_rolling", ours, [(text,) for text in TEXTS])
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(asked, True), theirs.loglikelihood_rolling(asked, True), atol=1e-3
    )


def test_generated_texts_are_the_same(both):
    theirs, ours = both
    context = "hello world"

    def generate(model, *settings):
        asked = requests("generate_until", ours, [(context, dict(one)) for one in settings])
        return model.generate_until(asked, True)

    (free,) = generate(theirs, {"until": [], "max_gen_toks": 40})
    assert len(free) > 10
    settings = [
        {"until": [], "max_gen_toks": 40},
        {"until": free[6:8], "max_gen_toks": 40},
        {"until": [free[9], free[4:7]], "max_gen_toks": 40, "do_sample": False, "temperature": 1.0},
        {"until": ["\n\n"], "max_new_tokens": 7, "temperature": 0.0},
        {"until": [], "max_tokens": 5, "do_sample": False, "top_p": 0.5},
        {"max_length": 25, "do_sample": False},
    ]
    found = generate(ours, *settings)
    assert found == [generate(theirs, one)[0] for one in settings]
    assert found[0] == free and found[1] == free[: free.find(free[6:8])] and len(set(found)) > 3


@pytest.mark.parametrize("prompt", [True, False])
def test_chats_are_the_same(both, prompt):
    theirs, ours = both
    chat = [{"role": "user", "content": "hello "}, {"role": "assistant", "content": "world "}]
    for messages in (chat[:1], chat, [{"role": "system", "content": "é"}, *chat]):
        found = ours.apply_chat_template(messages, add_generation_prompt=prompt)
        assert found == theirs.apply_chat_template(messages, add_generation_prompt=prompt)
        assert ours.tok_encode(found) == theirs.tok_encode(found)


def test_a_chat_of_what_is_refused_alone_is_one_line(both):
    with pytest.raises(DfssmError, match=r"the chat template refuses these messages \(no system\): use another"):
        both[1].apply_chat_template([{"role": "system", "content": "a"}])


def test_prefix_token_id_is_an_option(folder):
    assert DfssmLM(folder, prefix_token_id=7).prefix_token_id == 7


def test_a_task_asked_as_a_chat(folder, tmp_path):
    """What `--apply_chat_template` does; it ended in a traceback."""
    from lm_eval.tasks import TaskManager

    from dfssm.eval.suite import TASKS

    row = {"query": "Question: Cool soup.\n", "choices": ["Blow on it.", "Heat it."], "gold": 0}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"data": str(tmp_path)})
    found = lm_eval.simple_evaluate(
        DfssmLM(folder), tasks=["piqa"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0
    )
    context = found["samples"]["piqa"][0]["arguments"][0][0]
    assert "[user] Question: Cool soup." in context and context.rstrip().endswith("[assistant]")


def test_no_chat_template_is_one_line(teacher, bundle):
    for path in (teacher, bundle):
        with pytest.raises(DfssmError, match="has no chat template; put chat_template.jinja beside the model"):
            DfssmLM(path).apply_chat_template([{"role": "user", "content": "a"}])


def test_no_greedy_task_of_the_harness_is_refused(scorers):
    """All of its task files that generate: those that sample are refused, and only these."""
    from pathlib import Path

    model, seen, refused = DfssmLM(scorers["teacher"]), set(), 0
    for file in sorted((Path(lm_eval.__file__).parent / "tasks").rglob("*.y*ml")):
        try:
            settings = load_yaml(file, resolve_func=False, recursive=False).get("generation_kwargs")
        except Exception:  # a file of another kind
            continue
        if not isinstance(settings, dict) or (key := json.dumps(settings, sort_keys=True, default=str)) in seen:
            continue
        seen.add(key)
        settings = settings | {name: 1 for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in settings}
        settings.setdefault("max_gen_toks", 1)
        asked = [Instance("generate_until", {}, ("hello", settings), 0)]
        try:
            model.generate_until(asked, True)
        except DfssmError:
            refused += 1
            assert settings.get("do_sample") is True or float(settings.get("temperature") or 0) > 0, settings
            assert settings.get("do_sample") is not False
    assert len(seen) > 50 and refused < len(seen) / 4
