"""Documents of files: what each kind holds, and what is said of a file that cannot be read."""

import sys

import pytest

from dfssm.base import DfssmError
from dfssm.base.endings import END_OF_TEXT
from dfssm.model import text
from dfssm.model.text import batches, documents, text_files

ROWS = [{"text": "hello", "id": 1}, {"text": " a\nb \n", "id": 2}, {"text": " \n", "id": 3}, {"text": "é€😀", "id": 4}]
TEXTS = ["hello", "a\nb", "é€😀"]


class TestFiles:
    def test_a_folder_gives_its_text_files_sorted_and_a_file_is_taken_as_it_is(self, write, tmp_path):
        names = ["b.txt", "a/z.jsonl", "a/y.parquet", "c.ndjson"]
        for name in [*names, "config.json", "a/x.md"]:
            write("", name)
        assert text_files([tmp_path]) == [tmp_path / name for name in sorted(names)]
        assert text_files([tmp_path / "a/x.md", tmp_path / "a"]) == [
            tmp_path / name for name in ("a/x.md", "a/y.parquet", "a/z.jsonl")
        ]

    def test_what_is_not_there(self, tmp_path):
        with pytest.raises(DfssmError, match="nothing does not exist: give --data text"):
            text_files([tmp_path / "nothing"])
        with pytest.raises(DfssmError, match="no file in it ends in .txt, .*; name the files themselves"):
            text_files([tmp_path])


class TestPlain:
    def test_documents_end_at_the_mark(self, write):
        path = write(f"hello\n{END_OF_TEXT}\n a\nb {END_OF_TEXT}\n\n{END_OF_TEXT}é€😀")
        assert list(documents(path)) == TEXTS

    @pytest.mark.parametrize("content", ["", " \n ", END_OF_TEXT])
    def test_no_text_is_no_document(self, write, content):
        assert list(documents(write(content))) == []

    @pytest.mark.parametrize("piece", [1, 2, 7, 16, 100])
    def test_a_mark_may_lie_across_two_pieces(self, write, monkeypatch, piece):
        monkeypatch.setattr(text, "_PIECE", piece)
        content = f"one{END_OF_TEXT}two{END_OF_TEXT}{END_OF_TEXT}three"
        assert list(documents(write(content))) == ["one", "two", "three"]

    def test_a_long_text_without_a_mark_is_cut_at_a_line_else_between_words(self, write, monkeypatch):
        monkeypatch.setattr(text, "_LONGEST", 20)
        monkeypatch.setattr(text, "_PIECE", 7)
        assert list(documents(write("a b c\nd e f g h i j\nk l m n o p q r"))) == [
            "a b c\nd e f g h i j",
            "k l m n o p q r",
        ]
        long = "word " * 40
        found = list(documents(write(long)))
        assert " ".join(found) == long.strip() and max(map(len, found)) <= 33
        assert list(map(len, documents(write("x" * 95)))) == [20, 20, 20, 20, 15]

    @pytest.mark.parametrize("piece", [7, 1000])
    def test_no_mark_is_lost_where_a_text_without_spaces_is_cut(self, write, monkeypatch, piece):
        monkeypatch.setattr(text, "_LONGEST", 20)
        monkeypatch.setattr(text, "_PIECE", piece)
        for size in range(20, 45):
            found = list(documents(write(f"{'x' * size}{END_OF_TEXT}y")))
            assert "".join(found) == "x" * size + "y" and found[-1] == "y"

    def test_bytes_that_are_no_utf8_are_replaced_and_a_byte_order_mark_is_no_text(self, write):
        assert list(documents(write(b"\xef\xbb\xbfcaf\xe9"))) == ["caf\ufffd"]

    @pytest.mark.parametrize("content", [b"\x1f\x8b\x08\x00\x00\x00", "hello".encode("utf-16")])
    def test_what_is_packed_or_encoded_otherwise_is_not_trained_on(self, write, content):
        with pytest.raises(DfssmError, match="a.txt: is no UTF-8 text; unpack or convert it"):
            list(documents(write(content)))

    def test_a_folder_cannot_be_read(self, tmp_path):
        with pytest.raises(DfssmError, match=r"cannot be read \(Is a directory\); give --data other files"):
            list(documents(tmp_path))


class TestJsonLines:
    @pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
    def test_one_document_a_line(self, write, suffix):
        assert list(documents(write(ROWS, f"a{suffix}"))) == TEXTS

    def test_empty_lines_and_a_byte_order_mark_are_passed_over(self, write):
        assert list(documents(write('\ufeff\n{"text": "a"}\n\n  \n{"text": "b"}', "a.jsonl"))) == ["a", "b"]

    def test_a_long_document_is_cut_here_too(self, write, monkeypatch):
        monkeypatch.setattr(text, "_LONGEST", 20)
        found = list(documents(write([{"text": "word " * 40}, {"text": "b"}], "a.jsonl")))
        assert " ".join(found) == "word " * 40 + "b" and max(map(len, found)) <= 33

    def test_half_a_surrogate_pair_is_replaced(self, write, tokenizer):
        (found,) = documents(write(r'{"text": "a\ud83d b"}', "a.jsonl"))
        assert found == "a? b" and tokenizer.encode(found).ids

    @pytest.mark.parametrize("line", ['{"text": "b"', "[" * 100_000])
    def test_a_line_that_is_no_json_is_named(self, write, line):
        path = write('{"text": "a"}\n\n' + line + "\n", "a.jsonl")
        found = documents(path)
        assert next(found) == "a"
        with pytest.raises(DfssmError, match=r"a.jsonl, line 3: is no JSON \(.*\); mend or remove the line"):
            next(found)

    @pytest.mark.parametrize(
        "line, found",
        [
            ('{"story": "a", "n": 1}', r"story \(str\), n \(int\)"),
            ('{"text": null}', r"text \(NoneType\)"),
            ('["a"]', "list"),
            ('"text"', "str"),
            ("{}", "nothing"),
        ],
    )
    def test_a_line_without_text_is_named(self, write, line, found):
        with pytest.raises(DfssmError, match=f"a.jsonl, line 2: has no string 'text' but {found}; give each"):
            list(documents(write(f'{{"text": "a"}}\n{line}\n', "a.jsonl")))


class TestParquet:
    @pytest.fixture(autouse=True)
    def _pyarrow(self):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")

    @pytest.mark.parametrize("rows", [1, 3, 1024])
    def test_the_column_text(self, write, monkeypatch, rows):
        monkeypatch.setattr(text, "_ROWS", rows)
        columns = {name: [row[name] for row in ROWS] for name in ("id", "text")}
        assert list(documents(write(columns, "a.parquet", row_group_size=2))) == TEXTS

    def test_no_rows_are_no_documents(self, write):
        import pyarrow

        assert list(documents(write({"text": pyarrow.array([], pyarrow.string())}, "a.parquet"))) == []

    def test_no_such_column(self, write):
        with pytest.raises(DfssmError, match="a.parquet: has no column 'text' but story, n; rename that of the text"):
            list(documents(write({"story": ["a"], "n": [1]}, "a.parquet")))

    def test_a_row_without_text_is_named(self, write):
        with pytest.raises(DfssmError, match=r"a.parquet, row 2: has no string 'text' but text \(NoneType\)"):
            list(documents(write({"text": ["a", None]}, "a.parquet")))

    def test_a_damaged_file(self, write):
        whole = write({"text": ["a"] * 9}, "a.parquet").read_bytes()
        for content in (b"", b"hello", whole[:-9]):
            with pytest.raises(
                DfssmError, match=r"b.parquet: is no parquet file that can be read \(.*\); give another"
            ):
                list(documents(write(content, "b.parquet")))

    @pytest.mark.parametrize(
        "options",
        [{"dictionary_pagesize_limit": 1 << 30}, {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}],
        ids=["one text in many rows", "texts with one beginning"],
    )
    def test_rows_that_are_far_larger_than_the_file_are_not_all_held(self, write, monkeypatch, options):
        import pyarrow

        monkeypatch.setattr(text, "_SPARE", 4 << 20)
        path = write({"text": ["y" * (1 << 19)] * 400}, "a.parquet", compression="zstd", **options)  # 210 MB
        held, count = pyarrow.total_allocated_bytes(), 0
        for document in documents(path):
            assert len(document) == 1 << 19
            assert pyarrow.total_allocated_bytes() - held < 16 << 20
            count += 1
        assert count == 400

    def test_a_group_of_rows_that_unpacks_to_far_more_than_the_file_is_refused(self, write, monkeypatch):
        monkeypatch.setattr(text, "_SPARE", 4 << 20)
        path = write({"text": ["y" * (5 << 20)]}, "a.parquet", compression="zstd", use_dictionary=False)
        with pytest.raises(DfssmError, match="a group of rows unpacks to 5,242,[0-9]+ bytes, write smaller ones"):
            list(documents(path))

    def test_without_pyarrow(self, write, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(DfssmError, match="pyarrow is not installed: pip install 'pyarrow>="):
            list(documents(write("", "a.parquet")))


def test_batches_are_of_about_so_many_characters(monkeypatch):
    monkeypatch.setattr(text, "_BATCH", 5)
    assert list(batches(["abc", "de", "fghijklmn", "o", "p"])) == [["abc", "de"], ["fghijklmn"], ["o", "p"]]
    assert list(batches([])) == []
