"""The model type and the task files of lm-evaluation-harness, and the command that runs them."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner

from dfssm.base import DfssmError

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dfssm[eval]'")

from datasets import Dataset  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from dfssm.cli.main import main  # noqa: E402
from dfssm.eval.harness import DfssmLM  # noqa: E402
from dfssm.eval.suite import TASKS, run_tasks  # noqa: E402

# Of each task two questions: as the harness's own dataset has them, and as the local file has them.
QUESTIONS = {
    "arc_easy": (
        "arc/arc_easy.yaml",
        [
            {
                "question": "What melts ice?",
                "choices": {"text": ["heat", "wind"], "label": ["A", "B"]},
                "answerKey": "A",
            },
            {"question": "Who barks?", "choices": {"text": ["cat", "a dog"], "label": ["1", "2"]}, "answerKey": "2"},
        ],
        [
            {"query": "Question: What melts ice?", "choices": ["heat", "wind"], "gold": 0},
            {"query": "Question: Who barks?", "choices": ["cat", "a dog"], "gold": 1},
        ],
    ),
    "boolq": (
        "super_glue/boolq/default.yaml",
        [
            {"passage": "Dogs -- Dogs bark.", "question": "do dogs bark", "label": 1},
            {"passage": "Passage: a way.\nIt is long.", "question": "is it short", "label": 0},
        ],
        [
            {"query": "Passage: Dogs -- Dogs bark.\nQuestion: do dogs bark?", "choices": ["no", "yes"], "gold": 1},
            {
                "query": "Passage: Passage: a way.\nIt is long.\nQuestion: is it short?",
                "choices": ["no", "yes"],
                "gold": 0,
            },
        ],
    ),
    "piqa": (
        "piqa/piqa.yaml",
        [
            {"goal": "Cool soup.", "sol1": "Blow on it.", "sol2": "Heat it.", "label": 0},
            {"goal": "dresser", "sol1": "a", "sol2": "b", "label": 1},
        ],
        [
            {"query": "Question: Cool soup.\n", "choices": ["Blow on it.", "Heat it."], "gold": 0},
            {"query": "Question: dresser\n", "choices": ["a", "b"], "gold": 1},
        ],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        [
            {"sentence": "Ann met Eve and _ smiled.", "option1": "Ann", "option2": "Eve", "answer": "2"},
            {"sentence": "Bob fed Tim since _'s cat ran.", "option1": "Bob", "option2": "Tim", "answer": "1"},
        ],
        [
            {"context_options": ["Ann met Eve and Ann", "Ann met Eve and Eve"], "continuation": "smiled.", "gold": 1},
            {
                "context_options": ["Bob fed Tim since Bob", "Bob fed Tim since Tim"],
                "continuation": "'s cat ran.",
                "gold": 0,
            },
        ],
    ),
    "lambada_openai": (
        "lambada/lambada_openai.yaml",
        [{"text": "The cat sat on\n\nthe mat"}, {"text": 'He called, "Nadia'}],
        [
            {"context": "The cat sat on\n\nthe", "continuation": "mat"},
            {"context": "He called,", "continuation": '"Nadia'},
        ],
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        [
            {
                "activity_label": "Roof shingle removal",
                "ctx_a": "A man is sitting on a roof.",
                "ctx_b": "he",
                "endings": ["is ripping tiles off.", "falls [substeps] up.", "sings.", "runs."],
                "label": "3",
            },
            {
                "activity_label": "Health",
                "ctx_a": "How to rest [title] Lie down. Be still.",
                "ctx_b": "",
                "endings": ["Sleep. [title] Wake.", "Run.", "Eat.", "Sing."],
                "label": "0",
            },
        ],
        "Roof shingle removal: A man is sitting on a roof. he\n3\n"
        "is ripping tiles off.\nfalls up.\nsings.\nruns.\n"
        "Health: How to rest. Lie down. Be still.\n0\nSleep.. Wake.\nRun.\nEat.\nSing.\n",
    ),
}
FILES = {name: "hellaswag_val.txt" if name == "hellaswag" else f"{name}.jsonl" for name in QUESTIONS}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with four questions of each task."""
    folder = tmp_path_factory.mktemp("data")
    for name, (_, _, local) in QUESTIONS.items():
        text = local if isinstance(local, str) else "".join(json.dumps(row) + "\n" for row in local)
        (folder / FILES[name]).write_text(text * 2)
    return folder


@pytest.fixture(params=["teacher", "student", "bundle"])
def model(request, scorers):
    return DfssmLM(scorers[request.param], batch_size=3)


def instances(kind, *arguments):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


def invoke(*arguments):
    from dfssm.cli.main import dfssm

    return CliRunner().invoke(dfssm, ["eval", "tasks", *map(str, arguments)], catch_exceptions=False)


class TestModel:
    def test_loglikelihood_is_the_plain_loop(self, model, plain_log_probs, assert_close):
        pairs = [
            *(("hello world", " hello"), ("hello world", " world é"), ("", "hello"), ("hello ", "world")),
            *(("hello world hello", " w"), ("hello world", " who would")),
        ]
        found = model.loglikelihood(instances("loglikelihood", *pairs))
        expected = []
        for context, continuation in pairs:
            before = len(model.tok_encode(context.rstrip())) or 1
            ids = model.tok_encode(context + continuation)
            ids = ids if context else [model.eot_token_id, *ids]
            expected.append(plain_log_probs(model.scorer, ids)[before - 1 :].sum())
        assert_close(model.scorer, [value for value, _ in found], expected, 1e-4)

    def test_rolling_is_the_whole_text_after_the_end_of_one(self, model, plain_log_probs, assert_close):
        texts = ["hello world", "é" * 90, "a"]
        found = model.loglikelihood_rolling(instances("loglikelihood_rolling", *((text,) for text in texts)))
        ids = [[model.eot_token_id, *model.tok_encode(text)] for text in texts]
        assert_close(model.scorer, found, [plain_log_probs(model.scorer, row).sum() for row in ids], 1e-4)

    def test_generation_is_the_engines(self, scorers):
        model, engine = DfssmLM(scorers["bundle"]), scorers["bundle"].engine
        free = "".join(engine.generate("hello", max_tokens=20))
        stop = free[5:7]
        found = model.generate_until(
            instances(
                "generate_until",
                ("hello", {"until": [], "max_gen_toks": 20}),
                ("hello", {"until": stop, "max_gen_toks": 20, "temperature": 0.0, "do_sample": False}),
                ("", {"until": ["no such text"], "max_gen_toks": 3}),
            )
        )
        assert found[0] == free and found[1] == free[: free.find(stop)] and found[2]

    def test_a_bundle_answers_as_its_student_does(self, demo, demo_bundle, story):
        """On the same requests; one int8 activation on the other side of a tie is 0.04 nats here."""
        paths = (demo / "model.pt", demo_bundle)
        student, bundle = (DfssmLM(path, str(demo / "tokenizer.json"), batch_size=2) for path in paths)
        for kind, arguments in {
            "loglikelihood": [(story, " One day"), ("", story), (story + " She", " saw a big dog.")],
            "loglikelihood_rolling": [(story,), ("The dog",)],
        }.items():
            found, expected = (getattr(m, kind)(instances(kind, *arguments), True) for m in (bundle, student))
            if kind == "loglikelihood":
                assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
                found, expected = ([value for value, _ in values] for values in (found, expected))
            assert found == pytest.approx(expected, abs=0.1)
        asked = [(story[:79], {"until": ["\n"], "max_gen_toks": 40}), ("The dog", {"max_new_tokens": 20})]
        found, expected = (m.generate_until(instances("generate_until", *asked), True) for m in (bundle, student))
        assert found == expected and all(found)

    def test_sampling_is_refused(self, scorers):
        with pytest.raises(DfssmError, match="generates greedily"):
            DfssmLM(scorers["bundle"]).generate_until(instances("generate_until", ("a", {"do_sample": True})))

    def test_the_harness_makes_it_by_its_name(self, bundle, student):
        make = lm_eval.api.registry.get_model("dfssm").create_from_arg_string
        # The harness's command asks for cuda:0 and batches of 1 where it is told nothing.
        model = make(f"path={bundle}", {"device": "cuda:0", "batch_size": 1, "max_batch_size": None})
        assert (model.scorer.kind, model.batch_size) == ("bundle", 1)
        model = make(f"path={student}", {"device": "cpu", "batch_size": "auto"})
        assert (model.scorer.kind, model.batch_size) == ("student", 8)

    def test_it_is_declared_where_the_harness_looks(self):
        """The group of docs/plugins.md in the harness, from the release after 0.4.13 on."""
        assert entry_points(group="lm_eval.models")["dfssm"].load() is DfssmLM

    def test_the_command_lm_eval_knows_it_by_a_task_file(self, bundle, data, tmp_path):
        options = ["--model", "dfssm", "--model_args", f"path={bundle}", "--metadata", f"data={data}"]
        command = [sys.executable, "-m", "lm_eval", *options, "--tasks", TASKS / "piqa.yaml", "--output_path", tmp_path]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        theirs = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]["piqa"]
        ours = run_tasks(bundle, ["piqa"], data)["tasks"]["piqa"]["metrics"]
        assert {name: theirs[f"{name},none"] for name in ours} == {name: m["value"] for name, m in ours.items()}

    def test_the_harness_keeps_its_own_types(self):
        """They are registered where there are none yet; a process of its own, in which ours comes first."""
        code = "import dfssm.eval.harness; from lm_eval.api.registry import get_model; get_model('dummy')"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_through_us_it_knows_it_for_every_task(self, monkeypatch, capsys):
        import lm_eval.__main__

        def command():
            assert lm_eval.api.registry.get_model("dfssm") is DfssmLM
            assert sys.argv[1:] == ["--model", "dfssm", "-h", "--limit", "1"]
            raise DfssmError("a user's error")

        monkeypatch.setattr(sys, "argv", ["pytest"])
        monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", command)
        with pytest.raises(SystemExit) as end:
            main(["eval", "harness", "--model", "dfssm", "-h", "--limit", "1"])
        assert end.value.code == 1 and capsys.readouterr().err == "dfssm: error: a user's error\n"


class TestTaskFiles:
    @pytest.mark.parametrize("name", QUESTIONS)
    def test_questions_and_metrics_are_the_harnesses_own(self, name, data):
        """The same questions through the harness's definition and through ours give the same requests."""
        source, original, _ = QUESTIONS[name]
        theirs = load_yaml(Path(lm_eval.__file__).parent / "tasks" / source)
        theirs = {key: value for key, value in theirs.items() if key not in ("tag", "training_split")}
        splits = {key: Dataset.from_list(original * 2) for key in ("validation", "test")}
        theirs["custom_dataset"] = lambda **_: splits
        ours = load_yaml(TASKS / f"{name}.yaml") | {"metadata": {"data": str(data)}}
        tasks = [ConfigurableTask(config=dict(config)) for config in (theirs, ours)]
        for task in tasks:
            task.set_config(key="num_fewshot", value=0)
            task.build_all_requests(rank=0, world_size=1)
        theirs, ours = tasks
        assert [i.args for i in ours.instances] == [i.args for i in theirs.instances]
        assert [i.request_type for i in ours.instances] == [i.request_type for i in theirs.instances]
        for attribute in ("_metric_fn_list", "_metric_fn_kwargs", "_aggregation_list", "_higher_is_better"):
            assert getattr(ours, attribute) == getattr(theirs, attribute)
        # The right answer is the same: made-up answers have the same results.
        answers = [(float(-index), index % 2 == 0) for index in range(len(ours.instances))]
        per_question = len(answers) // 4
        for index, (doc, other) in enumerate(zip(ours.eval_docs, theirs.eval_docs, strict=True)):
            part = answers[index * per_question : (index + 1) * per_question][:: -1 if index % 2 else 1]
            assert ours.process_results(doc, part) == theirs.process_results(other, part)

    def test_versions_are_the_harnesses_own(self):
        for name, (source, _, _) in QUESTIONS.items():
            theirs = load_yaml(Path(lm_eval.__file__).parent / "tasks" / source, resolve_func=False)
            ours = load_yaml(TASKS / f"{name}.yaml", resolve_func=False)
            assert ours["metadata"]["version"] == theirs["metadata"]["version"]


class TestCommand:
    def test_every_task_on_the_demo_model(self, demo, data):
        result = invoke(demo / "model.pt", "--tasks", ",".join(QUESTIONS), "--data", data, "--json")
        assert result.exit_code == 0 and result.stdout.count("\n") == 1, result.output
        found = json.loads(result.stdout)
        assert (found["kind"], found["limit"], found["harness"]) == ("student", None, lm_eval.__version__)
        assert set(found["tasks"]) == set(QUESTIONS)
        for task in found["tasks"].values():
            assert (task["count"], task["available"], task["fewshot"]) == (4, 4, 0)
            for metric, entry in task["metrics"].items():
                assert entry["stderr"] >= 0
                assert metric == "perplexity" or 0 <= entry["value"] <= 1
        assert set(found["tasks"]["piqa"]["metrics"]) == {"acc", "acc_norm"}

    def test_a_bundle_answers_as_the_student_does(self, demo, demo_bundle, data):
        tokenizer = demo / "tokenizer.json"
        student, bundle = (
            run_tasks(path, ["lambada_openai", "piqa"], data, tokenizer=tokenizer)["tasks"]
            for path in (demo / "model.pt", demo_bundle)
        )
        for task in ("lambada_openai", "piqa"):
            for metric, entry in student[task]["metrics"].items():
                assert bundle[task]["metrics"][metric]["value"] == pytest.approx(entry["value"], rel=0.02)

    def test_a_table_for_people_and_a_limit(self, bundle, data):
        text = invoke(bundle, "--tasks", "piqa", "--data", data, "--limit", 2).stdout
        assert "(bundle), lm-eval" in text and "2 of 4" in text and "acc_norm" in text and "±" in text

    def test_an_unknown_task(self, bundle, data):
        with pytest.raises(DfssmError, match="task 'boolean' is not known: with --data there are arc_easy, boolq,"):
            invoke(bundle, "--tasks", "piqa,boolean", "--data", data)

    def test_no_tasks(self, bundle, data):
        assert invoke(bundle, "--tasks", " , ", "--data", data).exit_code == 2

    def test_no_such_file(self, bundle, tmp_path):
        with pytest.raises(DfssmError, match="piqa.jsonl does not exist: give --data the folder it is in"):
            invoke(bundle, "--tasks", "piqa", "--data", tmp_path)

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("piqa.jsonl", "", "piqa.jsonl: holds no questions"),
            ("piqa.jsonl", '{"query": "a"}\nno JSON\n', "piqa.jsonl, question 2: is no JSON"),
            ("piqa.jsonl", "[" * 100_000, "piqa.jsonl, question 1: is no JSON"),
            ("piqa.jsonl", '{"query": "a"}\n{"text": "b"}\n', "question 2: is no object with the keys"),
            ("piqa.jsonl", "[1]\n", "question 1: is no object"),
            ("hellaswag_val.txt", "A man. he\n3\na\nb\nc\nd\nA dog. he\n", "question 2: expected a beginning"),
            ("hellaswag_val.txt", "A man. he\nx\na\nb\nc\nd\n", "question 1: expected a beginning"),
        ],
    )
    def test_a_file_of_something_else(self, bundle, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(DfssmError, match=message):
            invoke(bundle, "--tasks", "piqa" if "piqa" in name else "hellaswag", "--data", tmp_path)

    def test_a_line_ends_where_the_file_says_so(self, tmp_path):
        """JSON may have a line separator (U+2028) inside a text as it is."""
        from dfssm.eval.records import json_lines

        (tmp_path / "a.jsonl").write_text(
            '{"query": "a\u2028b"}\n\n{"query": "c\x85d"}\r\n', encoding="utf-8", newline=""
        )
        (split,) = json_lines("a.jsonl", data=str(tmp_path)).values()
        assert split["query"] == ["a\u2028b", "c\x85d"]

    def test_a_task_without_its_folder(self):
        from dfssm.eval.records import json_lines

        with pytest.raises(DfssmError, match="reads piqa.jsonl of a folder that was not given"):
            json_lines("piqa.jsonl", path="as the harness passes on its model arguments")

    def test_no_harness(self, bundle, data, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(DfssmError, match=r"lm-eval is not installed: pip install 'dfssm\[eval\]'"):
            invoke(bundle, "--tasks", "piqa", "--data", data)
