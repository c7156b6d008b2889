"""The examples of docs/runtime.md run as they stand."""

import re
from pathlib import Path

import tiny
from chats import add_template

DOCS = Path(__file__).parents[2] / "docs" / "runtime.md"


def test_the_examples_run(cpu_target, tmp_path, monkeypatch, capsys):
    add_template(tiny.write_bundle(tmp_path / "model-ort-cpu", target=cpu_target, taps=True))
    monkeypatch.chdir(tmp_path)
    names = {"prefix_ids": [1, 2, 3], "question_ids": [4, 5]}
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
    assert capsys.readouterr().out
    assert names["batch"].tokens.tolist() == [3] * 8 and names["state"].tokens.tolist() == [3]
    assert names["hidden"].states.shape == (3, 2, 64)
    assert names["first"].finish_reason and names["other"].finish_reason
    assert [message["role"] for message in names["chat"].messages] == ["system", "user"]
    assert names["two"].tokens == 3 and len(names["slots"]) == 2 and names["logits"].shape[0] == 2
