"""Windows of a streamed data set: all documents but those held out, split by rank, resumed exactly. No network."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
import tiny

from dfssm.base import DfssmError
from dfssm.distill import stream

pytest.importorskip("datasets", reason="datasets is not installed")

END = tiny.CONFIG.eos_token_id
VOCAB = END + 1
SHARDS, ROWS, HELD_OUT, TOKENS = 3, 40, 7, 16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of five windows and batches of a few documents: an epoch has many of both."""
    monkeypatch.setattr(stream, "_BLOCK", 5)
    monkeypatch.setattr("dfssm.model.text._BATCH", 300)


@pytest.fixture(scope="module")
def texts():
    """Of each shard its documents: of many lengths, no two equal but one that is held out and comes again."""
    rng = np.random.default_rng(0)
    texts = [[f"{s}.{i} {rng.integers(1000, size=rng.integers(30))}" for i in range(ROWS)] for s in range(SHARDS)]
    texts[2][5] = texts[0][1]
    texts[1][3] = " \n"
    return texts


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def source(request, texts, tmp_path_factory):
    """The name of a data set that lies in a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    for shard, documents in enumerate(texts):
        path = folder / f"train-{shard}.{request.param}"
        if request.param == "jsonl":
            path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
        else:
            import pyarrow
            import pyarrow.parquet

            columns = {"id": range(ROWS), "text": documents}
            pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=13)
    return f"hf:{folder}"


@pytest.fixture
def windows(source, tokenizer):
    """windows(...) -> StreamedWindows of the source."""

    def windows(source=source, tokens=TOKENS, seed=0, vocab_size=VOCAB, **options):
        return stream.StreamedWindows(
            source, tokenizer, END, vocab_size, tokens, seed, **({"held_out": HELD_OUT} | options)
        )

    return windows


@pytest.fixture(scope="module")
def trained_on(texts):
    """What an epoch is to hold: every document but the empty one and those held out, wherever they lie."""
    stripped = [text.strip() for shard in texts for text in shard]
    found = [text for text in stripped[HELD_OUT:] if text and text not in stripped[:HELD_OUT]]
    assert len(found) == SHARDS * ROWS - HELD_OUT - 2
    return found


def plainly(tokenizer, documents):
    return [token for document in documents for token in (*tokenizer.encode(document).ids, END)]


class TestDocuments:
    def test_held_out_are_the_first_ones_the_same_for_all(self, windows, texts, tokenizer):
        expected = plainly(tokenizer, [text.strip() for text in texts[0][:HELD_OUT]])
        for options in ({}, {"seed": 1}, {"rank": 1, "world": 2}, {"rank": 0, "world": 3}):
            assert windows(**options).held_out.tolist() == expected
        assert len(windows(held_out=0).held_out) == 0

    @pytest.mark.parametrize("world", [1, 2, 3])  # of three shards: two ranks share documents, three ranks shards
    def test_ranks_share_all_others_without_overlap(self, windows, trained_on, world):
        read = [[], [], []]
        for rank in range(world):
            documents = windows(rank=rank, world=world)._documents
            while (batch := documents.read()) and (epoch := documents.state_dict()["epoch"]) < len(read):
                read[epoch] += batch
        for epoch in read:
            assert Counter(epoch) == Counter(trained_on)

    def test_shards_come_in_an_order_of_epoch_and_seed(self, windows):
        orders = []
        for seed in range(3):
            documents, order = windows(seed=seed)._documents, {0: [], 1: [], 2: []}
            while (batch := documents.read()) and (epoch := documents.state_dict()["epoch"]) < len(order):
                order[epoch] += dict.fromkeys(text.partition(".")[0] for text in batch)
            orders.append(["".join(dict.fromkeys(shards)) for shards in order.values()])
        assert all(sorted(shards) == ["0", "1", "2"] for order in orders for shards in order)
        assert len(set(orders[0])) > 1 and len({first for first, *_ in orders}) > 1


class TestWindows:
    @pytest.fixture
    def shard(self, windows, trained_on, write, tmp_path, monkeypatch):
        """shard(...) -> StreamedWindows of one shard with all of the documents to train on, in this order."""
        write([{"text": "held out"}, *({"text": text} for text in trained_on)], "data/a.jsonl")
        return lambda **options: windows(f"hf:{tmp_path / 'data'}", held_out=1, **options)

    @pytest.fixture
    def ids(self, trained_on, tokenizer):
        """The tokens of an epoch of `shard`."""
        return plainly(tokenizer, trained_on)

    @pytest.fixture
    def cuts(self, ids):
        """Its windows."""
        return [ids[start : start + TOKENS + 1] for start in range(0, len(ids) - TOKENS, TOKENS)]

    def test_every_token_is_predicted_once_an_epoch_in_an_order_of_the_seed(self, shard, cuts, monkeypatch):
        monkeypatch.setattr(stream, "_BLOCK", len(cuts))
        orders = [shard(seed=seed).take(len(cuts)) for seed in (0, 1, 0)]
        assert all(order.dtype == np.int64 and order.shape == (len(cuts), TOKENS + 1) for order in orders)
        first, other, again = (order.tolist() for order in orders)
        assert sorted(first) == sorted(other) == sorted(cuts)
        assert first == again and first != other and cuts not in (first, other)

    def test_blocks_follow_each_other_without_a_gap(self, shard, cuts):
        found, done, orders = shard(), 0, {}
        while done < len(cuts) - 50:
            block = [found.take(1)[0].tolist()]
            block += found.take(len(found._windows) - 1).tolist()
            expected = cuts[done : done + len(block)]
            assert 5 <= len(block) < 50 and sorted(block) == sorted(expected)
            orders.setdefault(len(block), []).append([expected.index(window) for window in block])
            done += len(block)
        repeated = [found for found in orders.values() if len(found) > 1]
        assert repeated and all(first != second for first, second, *_ in repeated)

    def test_the_epochs_go_on_in_windows_longer_than_one(self, shard, ids):
        (found,) = shard(tokens=2 * len(ids)).take(1)
        assert found.tolist() == [*ids, *ids, ids[0]]


class TestResume:
    @pytest.mark.parametrize("rank, world", [(0, 1), (1, 2), (2, 3)])
    def test_what_comes_is_what_would_have_come(self, windows, rank, world):
        unbroken, states, taken = windows(rank=rank, world=world), [], []
        for _ in range(70):
            states.append(json.loads(json.dumps(unbroken.state_dict())))
            taken.append(unbroken.take(12 // world).tolist())
        assert {state["documents"]["epoch"] for state in states} >= {0, 1}
        assert len({state["taken"] for state in states}) > 9  # all over the blocks
        resumed = windows(rank=rank, world=world)
        for first in [0, 1, 2, *range(3, 70, 7), 5]:
            resumed.load_state_dict(states[first])
            assert resumed.state_dict() == states[first]
            found = [resumed.take(len(part)).tolist() for part in taken[first : first + 9]]
            assert found == taken[first : first + 9], first

    def test_after_a_position_was_loaded_it_can_be_saved_before_anything_is_taken(self, windows):
        one = windows()
        one.take(23)
        two, three = windows(), windows()
        two.load_state_dict(one.state_dict())
        three.load_state_dict(two.state_dict())
        assert three.take(9).tolist() == one.take(9).tolist()

    def test_another_number_of_ranks_is_refused(self, windows):
        state = windows(rank=1, world=2).state_dict()
        with pytest.raises(DfssmError, match="that of rank 1 of 2, this is rank 0 of 1; resume with as many ranks"):
            windows().load_state_dict(state)


class TestRefusals:
    @pytest.mark.parametrize(
        "source, expected",
        [
            ("hf:a/b", ("a/b", None, "train")),
            ("hf:a/b@c", ("a/b", None, "c")),
            ("hf:b:c", ("b", "c", "train")),
            ("hf:a/b:c.d-e@f", ("a/b", "c.d-e", "f")),
        ],
    )
    def test_the_name(self, windows, monkeypatch, source, expected):
        def load_dataset(name, config, split, streaming):
            assert streaming
            raise FileNotFoundError(str((name, config, split)) + "\nmore")

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        with pytest.raises(DfssmError) as found:
            windows(source)
        assert str(found.value) == f"{source}: cannot be read ({expected}); check its name, its split and the network"

    @pytest.mark.parametrize("source", ["hf:", "a/b", "hf:a:b:c", "hf:a@b@c", "hf:a@"])
    def test_no_name(self, windows, source):
        with pytest.raises(DfssmError, match=r"is no name of a data set; give hf:NAME\[:CONFIG\]\[@SPLIT\]"):
            windows(source)

    @pytest.mark.parametrize(
        "rows, suffix, message",
        [
            ([{"story": "a", "n": 1}], "", "has no column 'text' but story, n; choose a data set with one"),
            ([{"text": "a"}, {"text": None}], "", r"has no string 'text' but text \(NoneType\)"),
            ([{"text": "a"}] * 7, "", "has 7 documents, 7 are held out; choose a larger one"),
            ([], "", r"cannot be read \(it is empty\); check its name"),
            (None, "", r"cannot be read \(Couldn't find any data file.*\); check its name"),
            ([{"text": "a"}], "@nothing", r"cannot be read \(Bad split: nothing.*\); check its name, its split"),
            ([{"text": "a"}], ":nothing", r"cannot be read \(BuilderConfig 'nothing' not found.*\); check its name"),
        ],
    )
    def test_what_cannot_be_trained_on(self, windows, write, tmp_path, rows, suffix, message):
        if rows is not None:
            write(rows, "data/a.jsonl")
        with pytest.raises(DfssmError, match=message) as found:
            windows(f"hf:{tmp_path / 'data'}{suffix}")
        assert "\n" not in str(found.value) and str(found.value).count("hf:") == 1

    def test_nothing_but_what_is_held_out(self, windows, write, tmp_path):
        write([{"text": "a"}, {"text": "b"}, {"text": "a "}, {"text": ""}], "data/a.jsonl")
        found = windows(f"hf:{tmp_path / 'data'}", held_out=2)
        with pytest.raises(DfssmError, match="has no text but what is held out; choose a larger one or fewer ranks"):
            found.take(1)

    def test_a_stream_that_breaks_off(self, windows, monkeypatch):
        import datasets

        def rows():
            yield from ({"text": f"document {i}"} for i in range(50))
            raise ConnectionError("the network is gone\nmore")

        dataset = datasets.IterableDataset.from_generator(rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: dataset)
        found = windows("hf:a")
        with pytest.raises(
            DfssmError, match=r"^hf:a: cannot be read \(the network is gone\); check its name.*network$"
        ):
            found.take(1000)

    def test_a_tokenizer_that_does_not_fit(self, windows):
        with pytest.raises(DfssmError, match=f"makes token {END}, the teacher has {END}: .* with --tokenizer"):
            windows(vocab_size=END)

    def test_without_datasets(self, windows, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DfssmError, match=r"datasets is not installed: pip install 'dfssm\[distill\]'"):
            windows("hf:a")
