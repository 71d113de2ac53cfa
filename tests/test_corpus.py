"""Corpora and windows: exact pieces, honest errors, few windows per document."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markers import change_marker
from tiny import NASTY, TINY_TEXTS, tokenizer

from featureinterp.corpus import windows as windows_module
from featureinterp.corpus.passages import passages
from featureinterp.corpus.text import Corpus, Document, load_corpus
from featureinterp.corpus.windows import WindowPolicy, WindowTable, build_windows, piece_ends
from featureinterp.errors import CorpusError, IncompleteStoreError, InputError, UnknownNameError
from featureinterp.subject.load import HubTokenizer

ENCODER = HubTokenizer(tokenizer())


def corpus_of(*texts: str, known: bool = True) -> Corpus:
    return Corpus("texts", lambda: (Document(str(i), t) for i, t in enumerate(texts)), len(texts) if known else None)


def table_of(folder: Path, *texts: str, known: bool = True, **policy: int | None) -> WindowTable:
    return build_windows(corpus_of(*texts, known=known), ENCODER, WindowPolicy(**{"length": 4, "min_length": 1, **policy}), folder)


@pytest.mark.parametrize("text", [*NASTY, *TINY_TEXTS])
def test_pieces_join_to_the_text_itself(tmp_path: Path, text: str):
    table = table_of(tmp_path / "w", text)
    assert "".join(p for row in range(len(table)) for p in table.pieces(row)) == text
    assert all("".join(table.pieces(row)) == table.text(row) for row in range(len(table)))
    assert [len(table.pieces(row)) for row in range(len(table))] == table.lengths.tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=80), length=st.integers(2, 7))
def test_pieces_join_for_any_text(tmp_path_factory: pytest.TempPathFactory, text: str, length: int):
    table = table_of(tmp_path_factory.mktemp("w") / "w", text, length=length)
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert "".join(table.text(row) for row in range(len(table))) == clean
    ids = np.concatenate([table.ids(row) for row in range(len(table))]).tolist()
    assert ids == ENCODER.encode([clean])[0].ids


def test_a_character_of_several_tokens_belongs_to_the_last_of_them():
    text = "a😀b"
    encoding = ENCODER.encode([text])[0]
    ends = piece_ends(text, encoding.offsets)
    pieces = [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert pieces[0] == "a" and pieces[-1] == "b" and pieces[-2] == "😀"
    assert set(pieces[1:-2]) <= {""}


def test_trimmed_white_space_goes_to_the_later_token():
    assert piece_ends("ab  cd", [(0, 2), (4, 6)]).tolist() == [2, 6]
    assert piece_ends("abc", []).tolist() == []
    assert piece_ends(" x", [(1, 2)]).tolist() == [2]


def test_strings_that_look_like_special_tokens_are_text():
    special = tokenizer().all_special_ids
    ids = ENCODER.encode(["<|endoftext|> and <|im_start|>"])[0].ids
    assert not set(ids) & set(special)
    assert tokenizer().decode(ids) == "<|endoftext|> and <|im_start|>"


def test_a_long_document_is_cut_into_segments_without_losing_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(windows_module, "SEGMENT_CHARS", 50)
    text = " ".join(TINY_TEXTS) + " " + "y" * 300
    table = table_of(tmp_path / "w", text)
    assert "".join(table.text(row) for row in range(len(table))) == text
    starts, lengths = table.starts, table.lengths
    assert starts.tolist() == [0, *np.cumsum(lengths)[:-1].tolist()]
    assert all(text.startswith(table.text(row), table.chars[row]) for row in range(len(table)))


def test_tokens_are_spread_over_documents_and_within_them(tmp_path: Path):
    texts = [" ".join(TINY_TEXTS) * 2 for _ in range(20)]
    table = table_of(tmp_path / "w", *texts, max_tokens=240)
    counts = np.bincount(table.documents, minlength=20)
    assert table.n_tokens <= 240 + 4 and counts.tolist() == [3] * 20
    assert all(texts[table.documents[row]].startswith(table.text(row), table.chars[row]) for row in range(len(table)))
    one = table.starts[table.documents == 0]
    all_of_one = len(ENCODER.encode([texts[0]])[0].ids)
    assert one[0] < all_of_one / 3 < one[1] < 2 * all_of_one / 3 < one[2]


def test_what_short_documents_lack_is_taken_from_later_ones(tmp_path: Path):
    table = table_of(tmp_path / "w", "a b", "c d", " ".join(TINY_TEXTS), max_tokens=60)
    assert 48 <= table.n_tokens <= 60 + 4
    assert np.bincount(table.documents).tolist()[2] > 8


def test_streamed_corpora_give_few_windows_per_document(tmp_path: Path):
    table = table_of(tmp_path / "w", *([" ".join(TINY_TEXTS)] * 5), known=False, max_tokens=10_000)
    assert np.bincount(table.documents).max() <= windows_module.STREAMED_WINDOWS_PER_DOCUMENT


def test_short_rests_are_kept_or_dropped_by_the_policy(tmp_path: Path):
    text = "Trade with the islands grew"
    n = len(ENCODER.encode([text])[0].ids)
    kept = table_of(tmp_path / "a", text, length=n - 1, min_length=1)
    assert kept.lengths.tolist() == [n - 1, 1] and kept.tokens[1, 1] == -1
    assert table_of(tmp_path / "b", text, length=n - 1, min_length=2).lengths.tolist() == [n - 1]


def test_a_finished_table_is_reused_and_a_changed_request_is_not(tmp_path: Path):
    table = table_of(tmp_path / "w", *TINY_TEXTS)
    stamp = (tmp_path / "w" / "tokens.bin").stat().st_mtime_ns
    assert table_of(tmp_path / "w", *TINY_TEXTS).fingerprint == table.fingerprint
    assert (tmp_path / "w" / "tokens.bin").stat().st_mtime_ns == stamp
    assert table_of(tmp_path / "w", *TINY_TEXTS, length=5).length == 5
    marker = tmp_path / "w" / "windows.json"
    change_marker(marker, format=1)
    with pytest.raises(IncompleteStoreError, match="another version"):
        WindowTable.open(tmp_path / "w")
    assert table_of(tmp_path / "w", *TINY_TEXTS).length == 4


def test_an_unfinished_table_says_so_and_a_failed_one_leaves_nothing(tmp_path: Path):
    with pytest.raises(CorpusError, match="no window"):
        table_of(tmp_path / "w", "", "")
    assert not (tmp_path / "w").exists()
    table_of(tmp_path / "w", *TINY_TEXTS)
    (tmp_path / "w" / "windows.json").unlink()
    with pytest.raises(IncompleteStoreError):
        WindowTable.open(tmp_path / "w")
    table_of(tmp_path / "v", *TINY_TEXTS)
    with (tmp_path / "v" / "tokens.bin").open("ab") as file:
        file.write(b"1")
    with pytest.raises(IncompleteStoreError, match="769 bytes instead of the 768"):
        WindowTable.open(tmp_path / "v")


@pytest.mark.parametrize("policy", [{"length": 1}, {"length": 8, "min_length": 9}, {"length": 8, "max_tokens": 7}, {"max_per_document": 0}])
def test_impossible_policies_are_refused(policy: dict[str, int]):
    with pytest.raises(InputError):
        WindowPolicy(**policy)


def texts_of(name: str, **options: str) -> list[str]:
    return [d.text for d in load_corpus(name, **options)]


def test_readers(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    assert texts_of(str(tmp_path / "a.txt")) == ["one\n\ntwo"]
    (tmp_path / "b.jsonl").write_text('{"text": "x\\ty"}\n\n{"text": "\\u0000z", "n": 1}\n', encoding="utf-8")
    assert texts_of(str(tmp_path / "b.jsonl")) == ["x\ty", "\x00z"]
    pq.write_table(pa.table({"body": ["p", None, "q"]}), tmp_path / "c.parquet")
    assert texts_of(str(tmp_path / "c.parquet"), text_field="body") == ["p", "q"]
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "2.txt").write_text("second")
    (folder / "sub" / "1.md").write_text("first")
    assert [d.id for d in load_corpus(str(folder))] == ["2.txt", "sub/1.md"]
    assert load_corpus(str(folder)).n_documents == 2


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab \n\r\t", max_size=200), st.integers(1, 40))
def test_passages_join_to_the_text(text: str, size: int):
    parts = list(passages(text, size))
    assert "".join(parts) == text
    assert all(len(p) >= size for p in parts[:-1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"caf\xe9", "not UTF-8"),
        ("x.txt", b"\x00\x01\x02" * 50, "binary"),
        ("x.jsonl", b'{"text": "a"}\nnot json\n', "line 2"),
        ("x.jsonl", b'{"body": "a"}\n', "body"),
        ("x.jsonl", b"[1]\n", "field"),
        ("x.parquet", b"PAR0", "parquet"),
    ],
)
def test_unusable_text_gets_one_clear_sentence(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        list(load_corpus(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_wrong_columns_and_missing_corpora(tmp_path: Path):
    pq.write_table(pa.table({"n": [1]}), tmp_path / "n.parquet")
    with pytest.raises(CorpusError, match="int64"):
        load_corpus(str(tmp_path / "n.parquet"), text_field="n")
    with pytest.raises(CorpusError, match="no column"):
        load_corpus(str(tmp_path / "n.parquet"))
    with pytest.raises(UnknownNameError, match="no corpus"):
        load_corpus(str(tmp_path / "none.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="no text file"):
        load_corpus(str(tmp_path / "empty"))


def test_a_corpus_is_known_by_its_content_and_by_how_it_is_read(tmp_path: Path):
    def print_of(name: str, **options: str) -> str:
        return load_corpus(str(tmp_path / name), **options).fingerprint

    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x", "body": "x"}\n')
    assert print_of("a.jsonl") == print_of("b.jsonl") != print_of("a.jsonl", text_field="body")
    (tmp_path / "b.jsonl").write_text('{"text": "y", "body": "x"}\n')
    assert print_of("a.jsonl") != print_of("b.jsonl")
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    assert print_of("t.txt") == print_of("t.txt", text_field="body") != print_of("t.txt", separator="lines")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "1.txt").write_text("one")
    (folder / "2.txt").write_text("two")
    before = print_of("folder")
    (folder / "2.txt").rename(folder / "0.txt")
    assert print_of("folder") != before
    assert corpus_of("a", "b").fingerprint == corpus_of("a", "b").fingerprint != corpus_of("b", "a").fingerprint


def test_lone_surrogates_of_json_do_not_break_a_table(tmp_path: Path):
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": "bad \ud800 here"}))
    table = build_windows(load_corpus(str(tmp_path / "s.jsonl")), ENCODER, WindowPolicy(4, 1), tmp_path / "w")
    assert "".join(table.text(r) for r in range(len(table))) == "bad \ufffd here"
