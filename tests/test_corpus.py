"""Corpora and windows: exact pieces, honest errors, few windows per document."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import NASTY, TINY_TEXTS, tokenizer

from featureinterp.corpus import cut
from featureinterp.corpus.cut import piece_ends
from featureinterp.corpus.passages import passages
from featureinterp.corpus.quota import even_quotas
from featureinterp.corpus.text import Corpus, Document, load_corpus
from featureinterp.corpus.windows import WindowPolicy, WindowTable, build_windows
from featureinterp.corpus.writing import STREAMED_WINDOWS_PER_DOCUMENT
from featureinterp.errors import (
    CorpusError,
    IncompatibleError,
    IncompleteStoreError,
    InputError,
    UnknownNameError,
)
from featureinterp.subject.load import HubTokenizer

ENCODER = HubTokenizer(tokenizer())


def corpus_of(*texts: str, known: bool = True) -> Corpus:
    return Corpus(
        "texts", lambda: (Document(str(i), t) for i, t in enumerate(texts)), len(texts) if known else None
    )


def table_of(folder: Path, *texts: str, known: bool = True, **policy: int | None) -> WindowTable:
    return build_windows(
        corpus_of(*texts, known=known),
        ENCODER,
        WindowPolicy(**{"length": 4, "min_length": 1, **policy}),
        folder,
    )


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


def test_a_long_document_is_cut_into_segments_without_losing_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cut, "SEGMENT_CHARS", 50)
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
    assert all(
        texts[table.documents[row]].startswith(table.text(row), table.chars[row]) for row in range(len(table))
    )
    one = table.starts[table.documents == 0]
    all_of_one = len(ENCODER.encode([texts[0]])[0].ids)
    assert one[0] < all_of_one / 3 < one[1] < 2 * all_of_one / 3 < one[2]


def test_what_short_documents_lack_is_taken_from_later_ones(tmp_path: Path):
    table = table_of(tmp_path / "w", "a b", "c d", " ".join(TINY_TEXTS), max_tokens=60)
    assert 48 <= table.n_tokens <= 60 + 4
    assert np.bincount(table.documents).tolist()[2] > 8


def test_streamed_corpora_give_few_windows_per_document(tmp_path: Path):
    text = " ".join(TINY_TEXTS)
    table = table_of(tmp_path / "w", *([text] * 50), known=False, max_tokens=600)
    assert 600 <= table.n_tokens < 604
    assert np.bincount(table.documents).max() <= STREAMED_WINDOWS_PER_DOCUMENT
    few = table_of(tmp_path / "f", *([text] * 5), known=False, max_tokens=600)
    assert 600 <= few.n_tokens < 604 and np.ptp(np.bincount(few.documents)) <= 1


SHORT, LONG = "In 1849", " ".join(TINY_TEXTS * 8)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0, 1, 0, 1], [1, 1, 0, 0, 2, 2, 2, 2]])
def test_what_empty_and_short_documents_leave_is_filled_whatever_their_order(
    tmp_path: Path, order: list[int], known: bool
):
    texts = [("", SHORT, LONG)[kind if len(order) == 8 else 2 * kind] for kind in order] * 3
    there = sum(len(ENCODER.encode([t])[0].ids) for t in texts)
    asked = there * 2 // 3
    table = table_of(tmp_path / "w", *texts, known=known, max_tokens=asked)
    assert asked - 4 < table.n_tokens < asked + 4 and table.notes == []
    assert np.all(np.diff(table.documents) >= 0) and table.document_ids() == [
        str(i) for i in range(len(texts))
    ]
    everything = table_of(tmp_path / "all", *texts, known=known, max_tokens=10 * there)
    assert everything.n_tokens == there
    assert everything.notes == [
        f"the corpus gives {there:,} of the {10 * there:,} tokens asked for (windows of 1 to 4 tokens)"
    ]


def test_the_quota_of_one_document_stays_when_the_rest_is_filled(tmp_path: Path):
    table = table_of(tmp_path / "w", *([LONG] * 3), *([""] * 3), max_tokens=1000, max_per_document=5)
    assert (
        np.bincount(table.documents).tolist() == [5, 5, 5] and "at most 5 of one document" in table.notes[0]
    )


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=12),
    aim=st.integers(4, 200),
    most=st.none() | st.integers(1, 5),
)
def test_even_quotas_reach_the_aim_and_nobody_gives_more_while_others_have_some(
    documents: list[tuple[int, int]], aim: int, most: int | None
):
    length = 4
    windows = np.array([w for w, _ in documents])
    tokens = np.array([max(0, w * length - short) for w, short in documents])
    room = windows if most is None else np.minimum(windows, most)
    quotas = even_quotas(windows, tokens, room, aim, length)
    assert (quotas <= room).all() and (quotas >= 0).all()
    below = quotas < room
    if below.any():
        assert quotas.max() <= quotas[below].min() + 1

    def given_by(quotas: np.ndarray) -> int:
        total = 0
        for q, w, t in zip(quotas.tolist(), windows.tolist(), tokens.tolist(), strict=True):
            chosen = [(2 * j + 1) * w // (2 * q) for j in range(q)]
            total += sum(length if k < w - 1 else t - (w - 1) * length for k in chosen)
        return total

    assert (quotas == room).all() or aim <= given_by(quotas) < aim + length + 3 * len(documents)


def test_a_large_corpus_is_not_read_whole_for_the_few_tokens_that_its_end_lacks(tmp_path: Path):
    read: list[str] = []

    class Counting:
        fingerprint = "counting"

        def encode(self, texts: list[str]) -> object:
            read.extend(texts)
            return ENCODER.encode(texts)

    texts = [LONG] * 300 + [""] * 300
    table = build_windows(corpus_of(*texts), Counting(), WindowPolicy(4, 1, 200), tmp_path / "w")
    assert 196 < table.n_tokens < 204
    assert len(read) < 300


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
    for changed in ({"length": 5}, {"max_tokens": 20}):
        with pytest.raises(IncompatibleError, match="other text, or of another policy"):
            table_of(tmp_path / "w", *TINY_TEXTS, **changed)
    with pytest.raises(IncompatibleError, match="give another folder"):
        table_of(tmp_path / "w", *TINY_TEXTS[:-1], "The same name, another text.")
    assert (tmp_path / "w" / "tokens.bin").stat().st_mtime_ns == stamp
    assert not (tmp_path / "w.new").exists()
    marker = tmp_path / "w" / "windows.json"
    meta = json.loads(marker.read_text())
    meta.pop("checksum"), meta.pop("files")
    marker.write_text(
        json.dumps({**{k: v for k, v in meta.items() if k != "content"}, "key": "of an earlier version"})
    )
    assert table_of(tmp_path / "w", *TINY_TEXTS).fingerprint == table.fingerprint
    with pytest.raises(IncompatibleError):
        table_of(tmp_path / "w", *TINY_TEXTS[:-1])
    marker.write_text(json.dumps({**meta, "format": 1}))
    with pytest.raises(IncompleteStoreError, match="another version"):
        WindowTable.open(tmp_path / "w")


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_corpus_that_lies_elsewhere_now_is_the_same(tmp_path: Path, as_folder: bool):
    before, after = (
        (tmp_path / "a", tmp_path / "elsewhere" / "b")
        if as_folder
        else (tmp_path / "a.jsonl", tmp_path / "renamed.jsonl")
    )
    if as_folder:
        before.mkdir()
        for i, text in enumerate(TINY_TEXTS):
            (before / f"{i}.txt").write_text(text)
    else:
        before.write_text("".join(json.dumps({"text": text}) + "\n" for text in TINY_TEXTS))
    policy = WindowPolicy(8, 2)
    first = build_windows(load_corpus(str(before)), ENCODER, policy, tmp_path / "w")
    written = (tmp_path / "w" / "windows.json").stat()
    after.parent.mkdir(exist_ok=True)
    before.rename(after)
    again = build_windows(load_corpus(str(after)), ENCODER, policy, tmp_path / "w")
    now = (tmp_path / "w" / "windows.json").stat()
    assert (now.st_mtime_ns, now.st_ino) == (
        written.st_mtime_ns,
        written.st_ino,
    ) and again.fingerprint == first.fingerprint
    changed = after / "0.txt" if as_folder else after
    changed.write_text(changed.read_text().replace("army", "navy"))
    with pytest.raises(IncompatibleError, match="other text"):
        build_windows(load_corpus(str(after)), ENCODER, policy, tmp_path / "w")


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


@pytest.mark.parametrize(
    "policy",
    [{"length": 1}, {"length": 8, "min_length": 9}, {"length": 8, "max_tokens": 7}, {"max_per_document": 0}],
)
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


ROWS = [
    {"text": 'one, "two"\nthree', "n": 1},
    {"text": None, "n": 2},
    {"text": "", "n": 3},
    {"text": "fünf\ttabs", "n": 4},
]
TEXTS = ['one, "two"\nthree', "", "fünf\ttabs"]


def csv_of(delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["n", "text"])
    writer.writerows([row["n"], row["text"]] for row in ROWS if row["text"] is not None)
    return out.getvalue().encode()


def lines_of(rows: list[object]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def arrow_of(kind: str) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": [r["text"] for r in ROWS], "n": [1, 2, 3, 4]})
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


FILES = {
    "a.jsonl": lines_of(ROWS),
    "a.jsonlines": lines_of(ROWS),
    "a.NDJSON": lines_of(ROWS),
    "a.jsonl.gz": gzip.compress(lines_of(ROWS), mtime=0),
    "a.jsonl.bz2": bz2.compress(lines_of(ROWS)),
    "a.jsonl.xz": lzma.compress(lines_of(ROWS)),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": lines_of(ROWS),
    "texts.json": json.dumps([r["text"] for r in ROWS]).encode(),
    "column.json": json.dumps({"text": [r["text"] for r in ROWS]}).encode(),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode(), mtime=0),
    "a.csv": csv_of(","),
    "semicolons.csv": csv_of(";"),
    "a.csv.gz": gzip.compress(csv_of(","), mtime=0),
    "mark.csv": b"\xef\xbb\xbf" + csv_of(","),
    "a.tsv": csv_of("\t"),
    "a.arrow": arrow_of("stream"),
    "a.feather": arrow_of("file"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_rows_are_read_as_what_they_are(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(FILES[name])
    corpus = load_corpus(str(tmp_path / name))
    assert [d.text for d in corpus] == TEXTS == [d.text for d in corpus]
    assert corpus.n_documents == 3 and len({d.id for d in corpus}) == 3
    assert corpus.tally.n_null == (0 if "csv" in name or "tsv" in name else 1)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_columns_of_every_kind_of_string_are_text(tmp_path: Path, kind: pa.DataType):
    column = pa.array(["p", None, "q", "p"], pa.string())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    for name, write in (("c.parquet", pq.write_table), ("c.feather", feather.write_feather)):
        write(pa.table({"body": column}), str(tmp_path / name))
        corpus = load_corpus(str(tmp_path / name), text_field="body")
        assert [d.text for d in corpus] == ["p", "q", "p"] and corpus.tally.n_null == 1


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": None}, {"text": LONG}, {"text": None}]))
    table = build_windows(load_corpus(str(tmp_path / "a.jsonl")), ENCODER, WindowPolicy(4, 1), tmp_path / "w")
    assert table.notes == ["2 of the rows that were read have no text (null) and are left out"]
    assert table.document_ids() == ["a.jsonl:2"]


@pytest.mark.parametrize("kind", ["shards", "texts", "compressed"])
def test_a_folder_is_its_data_and_not_what_describes_it(tmp_path: Path, kind: str):
    (tmp_path / "README.md").write_text("# A data set\n")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.txt").write_text("hidden")
    if kind == "texts":
        (tmp_path / "b.txt").write_text("second")
        (tmp_path / "a.md").write_text("first")
        (tmp_path / "licence.txt").write_text("you may")
        expected = {"a.md": "first", "b.txt": "second"}
    else:
        ending, pack = (".jsonl.gz", gzip.compress) if kind == "compressed" else (".jsonl", bytes)
        for i in range(2):
            (tmp_path / f"part-{i}{ending}").write_bytes(
                pack(lines_of([{"text": f"{i}{j}"} for j in range(2)]))
            )
        (tmp_path / "dataset_info.json").write_text("{}")
        expected = {f"part-{i}{ending}:{j + 1}": f"{i}{j}" for i in range(2) for j in range(2)}
    corpus = load_corpus(str(tmp_path))
    assert {d.id: d.text for d in corpus} == expected and corpus.n_documents == len(expected)
    assert "README.md" in corpus.unread


def test_folders_of_several_kinds_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(ROWS))
    (tmp_path / "b.csv").write_bytes(csv_of(","))
    with pytest.raises(CorpusError, match=r"several kinds \(1 of (jsonl|csv), 1 of (csv|jsonl)\)"):
        load_corpus(str(tmp_path))


DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("deep.jsonl", b'{"text": "a"}\n' + DEEP, "line 2 of .* is nested too deeply"),
        ("deep.json", DEEP, "is nested too deeply"),
        ("digits.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1 .* number that is too long"),
        ("cut.jsonl.gz", gzip.compress(lines_of(ROWS) * 99, mtime=0)[:-12], "is damaged"),
        ("no.jsonl.gz", lines_of(ROWS), "is damaged, or is not compressed as its name says"),
        ("no.jsonl.xz", lines_of(ROWS), "is damaged, or is not compressed"),
        ("other.json", b'{"body": "a"}', r"\(it has: body\): name the right one with --text-field"),
        ("number.json", b"3", "has no text in the field"),
        ("more.csv", b"text,n\none,1\ntwo, three,2\n", "row 2 .* has 3 columns under a header of 2"),
        ("open.csv", b'text,n\n"one,1\n', "is not CSV as its name says"),
        ("none.csv", b"a,b\n1,2\n", "it has: a, b"),
        ("latin.csv", b"text\ncaf\xe9\n", "is not UTF-8"),
        ("bad.arrow", b"ARROW1 and nothing", "is not an Arrow file"),
        ("lines.txt", lines_of(ROWS), "holds JSON, and not plain text"),
        ("deep.txt", DEEP, "holds JSON"),
        ("array.txt", json.dumps(ROWS).encode(), "holds JSON"),
        ("page.txt", b"<!DOCTYPE html><html>", "HTML or XML"),
        ("book", b"%PDF-1.7", "is PDF"),
        ("packed.txt", gzip.compress(b"text", mtime=0), "is gzip"),
        ("page.html", b"text", "no plain text by its name"),
        ("a.parquet.gz", b"text", "no plain text by its name"),
        ("a.docx", b"PK", "no plain text by its name"),
    ],
)
def test_what_is_no_text_is_never_read_as_prose(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        list(load_corpus(str(tmp_path / name)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_damaged_parquet_page_is_one_sentence(tmp_path: Path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(2000)]}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:3000] = bytes(2996)
    path.write_bytes(bytes(data))
    with pytest.raises(CorpusError, match="damaged") as caught:
        list(load_corpus(str(path)))
    assert "\n" not in str(caught.value)


PARTS = ["First document.\nIt goes on.", "The second one.", "A third."]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_documents_of_one_file_are_told_apart_with_every_line_end(tmp_path: Path, end: str):
    path = tmp_path / "t.txt"

    def parts(text: str, **options: str) -> list[str]:
        path.write_bytes(text.replace("\n", end).encode())
        return [p.replace(end, "\n") for p in texts_of(str(path), **options)]

    assert parts("\n<|endoftext|>\n".join(PARTS)) == [p + "\n" * (p != PARTS[-1]) for p in PARTS]
    assert [p.strip() for p in parts("<|endoftext|>\n".join(PARTS) + "<|endoftext|>")] == PARTS
    lines = [p.replace("\n", " ") for p in PARTS]
    assert parts("\n".join(lines) + "\n\n", document_separator="lines") == lines
    assert parts("\n***\n".join(PARTS), document_separator="\\n***\\n") == PARTS
    assert parts("=====".join(PARTS), document_separator="=====") == PARTS
    assert len(parts("\n\n".join(PARTS), document_separator="none")) == 1
    paragraphs = "\n\n".join("word " * 1000 for _ in range(5))
    assert len(parts(paragraphs)) == len(parts(paragraphs, document_separator="blank-lines")) == 5
    assert "".join(parts(paragraphs)) == paragraphs
    long_lines = "\n".join("word " * 100 for _ in range(100))
    assert len(parts(long_lines)) == 13 and "".join(parts(long_lines)) == long_lines
    assert len(parts("One line about <|endoftext|> and how it is used.")) == 1


def test_a_file_of_a_folder_is_cut_where_it_says_so(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.txt").write_text("three\n<|endoftext|>\nfour")
    assert [d.id for d in load_corpus(str(tmp_path))] == ["a.txt", "b.txt#0", "b.txt#1"]
    assert len(texts_of(str(tmp_path), document_separator="lines")) == 5
    with pytest.raises(InputError, match="cannot be separated by"):
        load_corpus(str(tmp_path), document_separator=" ")
    (tmp_path / "r.jsonl").write_bytes(lines_of(ROWS))
    with pytest.raises(InputError, match="--document-separator is for plain text"):
        load_corpus(str(tmp_path / "r.jsonl"), document_separator="lines")


def test_a_corpus_is_known_by_its_content_and_by_how_it_is_read(tmp_path: Path):
    def print_of(name: str, **options: str) -> str:
        return load_corpus(str(tmp_path / name), **options).fingerprint

    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x", "body": "x"}\n')
    assert print_of("a.jsonl") == print_of("b.jsonl") != print_of("a.jsonl", text_field="body")
    (tmp_path / "b.jsonl").write_text('{"text": "y", "body": "x"}\n')
    assert print_of("a.jsonl") != print_of("b.jsonl")
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    assert (
        print_of("t.txt")
        == print_of("t.txt", text_field="body")
        != print_of("t.txt", document_separator="lines")
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "1.txt").write_text("one")
    (folder / "2.txt").write_text("two")
    before = print_of("folder")
    (folder / "2.txt").rename(folder / "0.txt")
    assert print_of("folder") != before
    assert (
        corpus_of("a", "b").fingerprint == corpus_of("a", "b").fingerprint != corpus_of("b", "a").fingerprint
    )


def test_lone_surrogates_of_json_do_not_break_a_table(tmp_path: Path):
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": "bad \ud800 here"}))
    table = build_windows(load_corpus(str(tmp_path / "s.jsonl")), ENCODER, WindowPolicy(4, 1), tmp_path / "w")
    assert "".join(table.text(r) for r in range(len(table))) == "bad \ufffd here"
