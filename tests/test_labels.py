"""Labels of documents as labels of a run's tokens, against a plain loop over characters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import NASTY, TINY_TEXTS, tokenizer

from featureinterp.codes.runs import RunWriter
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.text import Corpus, Document
from featureinterp.corpus.windows import WindowPolicy, build_windows
from featureinterp.errors import IncompatibleError, InputError, UnknownNameError
from featureinterp.probing import RunTokens, Span, load_labels
from featureinterp.probing.labels import ready_labels
from featureinterp.subject.load import HubTokenizer

ENCODER = HubTokenizer(tokenizer())


def corpus_of(*texts: str) -> Corpus:
    documents = [Document(f"d{i}", text) for i, text in enumerate(texts)]
    return Corpus("test", lambda: iter(documents), len(documents))


def run_of(folder: Path, *texts: str, seed: int = 0, **policy: int) -> CodesStore:
    """Windows of some texts with random codes of four features, and every seventh token not scored."""
    windows = build_windows(
        corpus_of(*texts),
        ENCODER,
        WindowPolicy(**{"length": 5, "min_length": 1, **policy}),
        folder / "windows",
    )
    writer = RunWriter(
        folder / "codes", n_features=4, n_positions=len(windows) * windows.length, value_dtype="float32"
    )
    rng = np.random.default_rng(seed)
    there = np.flatnonzero(np.arange(windows.length) < np.asarray(windows.lengths)[:, None])
    unscored = there[::7]
    scored = np.setdiff1d(there, unscored)
    cells = rng.random((len(scored), 4)) < 0.4
    rows, features = np.nonzero(cells)
    writer.add(
        scored[rows],
        features,
        rng.random(len(rows)) + 0.1,
        n_scored=len(scored),
        end_window=len(windows),
        unscored=unscored,
    )
    writer.finish({})
    return CodesStore.open(folder)


def by_character(
    store: CodesStore, texts: tuple[str, ...], spans: dict[int, list[tuple[int, int]]]
) -> list[set[int]]:
    """For every scored token the places in ``spans[document]`` that it belongs to."""
    table, out = store.windows, []
    for window in range(len(table)):
        at, text = int(table.chars[window]), texts[table.documents[window]]
        for offset, piece in enumerate(table.pieces(window)):
            characters = range(at, at + len(piece))
            assert text[at : at + len(piece)] == piece
            ink = {c for c in characters if not text[c].isspace()}
            if window * table.length + offset not in store.unscored:
                mine = spans.get(int(table.documents[window]), [])
                out.append(
                    {
                        i
                        for i, (a, b) in enumerate(mine)
                        if (ink & set(range(a, b)) if ink else a <= at and at + len(piece) <= b)
                    }
                )
            at += len(piece)
    return out


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_tokens_belong_to_spans_as_characters_say(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    texts = tuple(
        data.draw(
            st.lists(
                st.one_of(st.sampled_from([*TINY_TEXTS, *NASTY]), st.text(min_size=1, max_size=40)),
                min_size=1,
                max_size=4,
            )
        )
    )
    texts = tuple(t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts)
    store = run_of(tmp_path_factory.mktemp("run"), *texts)
    spans: dict[int, list[tuple[int, int]]] = {}
    for document, text in enumerate(texts):
        ends = (
            st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))
            .map(sorted)
            .filter(lambda s: s[0] < s[1])
        )
        spans[document] = [tuple(s) for s in data.draw(st.lists(ends, max_size=6))]
    number = iter(range(len(texts)))
    labels = load_labels(lambda text: [(a, b, "x") for a, b in spans[next(number)]])
    tokens = RunTokens(store)
    expected = by_character(store, texts, spans)
    assert len(tokens.positions) == len(expected) == store.n_scored
    if not any(expected):  # no span, or none that meets a scored token
        with pytest.raises(InputError, match="labels nothing"):
            tokens.labelled(labels, corpus_of(*texts))
        return
    found = tokens.labelled(labels, corpus_of(*texts))
    assert found.labels[:, 0].tolist() == [bool(e) for e in expected]
    ids = found.instances["x"].reshape(len(expected), -1)
    groups: dict[int, set[int]] = {}
    for row, numbers in enumerate(ids.tolist()):
        for i in numbers:
            if i >= 0:
                groups.setdefault(i, set()).add(row)
    documents = tokens.documents.tolist()
    wanted = sorted(
        sorted(rows)
        for d, mine in spans.items()
        for i in range(len(mine))
        if (rows := [row for row, e in enumerate(expected) if documents[row] == d and i in e])
    )
    assert sorted(sorted(rows) for rows in groups.values()) == wanted


def test_codes_of_the_scored_tokens(tmp_path: Path):
    store = run_of(tmp_path, *TINY_TEXTS)
    tokens = RunTokens(store)
    dense = np.stack(
        [store.window_activations(f, np.arange(len(store.windows))) for f in range(4)], axis=2
    ).reshape(-1, 4)
    np.testing.assert_array_equal(tokens.codes.dense(np.arange(4)), dense[tokens.positions])
    assert (
        set(tokens.positions.tolist()).isdisjoint(store.unscored.tolist())
        and tokens.codes.n_rows == store.n_scored
    )


def test_overlapping_instances_keep_both_ids_and_parts_of_one_share_theirs(tmp_path: Path):
    store = run_of(tmp_path, "alpha beta gamma delta", length=16)
    spans = [Span(0, 10, "n", "a"), Span(6, 16, "n", "b"), Span(17, 22, "n", "a")]
    found = RunTokens(store).labelled(load_labels(lambda text: spans), corpus_of("alpha beta gamma delta"))
    ids = found.instances["n"]
    assert ids.ndim == 2 and {0, 1} <= set(ids.ravel().tolist())
    both = [row for row in ids.tolist() if set(row) >= {0, 1}]
    assert both  # tokens of "beta"
    assert set(ids[-1].tolist()) == {0, -1} and found.n_outside == 0


def test_spans_of_a_file(tmp_path: Path):
    store = run_of(tmp_path, "one two three", "four five six", length=16)
    rows = [
        {"document": "d1", "start": 5, "end": 9, "label": "odd"},
        {"document": "d0", "start": 4, "end": 7, "label": "even", "instance": 7},
        {"document": "d0", "start": 500, "end": 510, "label": "odd"},
    ]
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = RunTokens(store).labelled(load_labels(file))
    assert found.names == ("odd", "even") and found.n_spans == 3 and found.n_outside == 1
    documents = RunTokens(store).documents
    assert set(documents[found.labels[:, 0]]) == {1} and set(documents[found.labels[:, 1]]) == {0}
    file.write_text(json.dumps({**rows[0], "document": "d9"}))
    with pytest.raises(UnknownNameError, match=r"document 'd9', which the run does not have \(it has 'd0'"):
        RunTokens(store).labelled(load_labels(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of .* is not JSON"),
        ('{"document": "d", "start": 1.5, "end": 2, "label": "x"}', "no 'start' that is a whole number"),
        ('{"document": "d", "start": true, "end": 2, "label": "x"}', "no 'start' that is a whole number"),
        ('{"document": "d", "start": 1, "end": 2}', "no 'label' that is text"),
        ('{"document": "d", "start": 3, "end": 3, "label": "x"}', "from 3 to 3"),
        ("[]", "no 'document' that is text"),
        ("", "holds no span"),
    ],
)
def test_wrong_lines_get_one_sentence(tmp_path: Path, line: str, message: str):
    file = tmp_path / "l.jsonl"
    file.write_text(line)
    with pytest.raises(InputError, match=message):
        load_labels(file)


def test_patterns_from_a_file_and_what_is_wrong_with_them(tmp_path: Path):
    file = tmp_path / "l.toml"
    file.write_text("a = 'x+'\n[b]\npattern = 'y(?P<x>z)?'\n")
    labels = load_labels(file)
    assert labels.names == ("a", "b")
    assert [(s.start, s.end, s.label) for s in labels.of("d", "xx y yz")] == [(0, 2, "a"), (6, 7, "b")]
    for text, message in (
        ("a = '('", "'a' in .* is no regular expression"),
        ("a = 3", "is no regular expression"),
        ("", "holds no label"),
        ("a =", "is not TOML"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            load_labels(file)
    with pytest.raises(UnknownNameError, match="no labels 'nothing'.*years"):
        load_labels("months, nothing")
    assert load_labels("months,money").names == ("months", "money")


def test_a_function_that_gives_no_spans_is_told_so():
    for found, message in (
        (5, "which is no span"),
        ((1, 2), "which is no span"),
        ((0.5, 1.7, "x"), "which is no span"),
        (("0", "2", "x"), "which is no span"),
        ((0, 99, "x"), "from 0 to 99 in the document 'd' of 3 characters"),
    ):
        with pytest.raises(InputError, match=message):
            list(load_labels(lambda text, found=found: [found]).of("d", "abc"))
    assert list(load_labels(lambda text: [(1, 1, "x")]).of("d", "abc")) == []
    assert [s.end for s in load_labels(lambda text: [(0, np.int64(2), "x")]).of("d", "abc")] == [2]


def test_another_corpus_is_refused(tmp_path: Path):
    store = run_of(tmp_path, *TINY_TEXTS)
    with pytest.raises(IncompatibleError, match="the document 'd1' of the corpus test is not the one"):
        RunTokens(store).labelled(ready_labels(), corpus_of(TINY_TEXTS[0], "changed", *TINY_TEXTS[2:]))
    with pytest.raises(IncompatibleError, match="fewer documents"):
        RunTokens(store).labelled(ready_labels(), corpus_of(*TINY_TEXTS[:3]))
    with pytest.raises(InputError, match="needs the documents' text"):
        RunTokens(store).labelled(ready_labels())


READY = {
    "years": ("In 1849 and 2001, not 12345 or 999.", ["1849", "2001"]),
    "numbers": ("In 1849 it cost 1,250.75 for 3 of v2.5 (40%).", ["1,250.75", "3", "40"]),
    "months": ("March on, May 3, May I? December.", ["March", "May", "December"]),
    "money": (
        "It cost $1,500 million, 25 cents or 3.5 million dollars, not 7.",
        ["$1,500 million", "25 cents", "3.5 million dollars"],
    ),
    "names": (
        "The Congress of the United States met. Then he saw Lord North, a Tory.",
        ["Congress of the United States", "Lord North", "Tory"],
    ),
    "quotations": ('He said “no more”, and "never".', ["“no more”", '"never"']),
    "sentence starts": ("One. Two! “Three?” said he. four", ["One", "Two", "Three"]),
    "negation": (
        "He didn't, and never will; nor can’t cannot. Knot nothing",
        ["never", "nor", "cannot", "nothing", "didn't", "can’t"],
    ),
    "function words": ("The ship of it", ["The", "of", "it"]),
}


def test_ready_labels():
    labels = ready_labels()
    assert set(labels.names) == set(READY)
    for name, (text, expected) in READY.items():
        found = [text[s.start : s.end] for s in labels.of("d", text) if s.label == name]
        assert sorted(found) == sorted(expected), name
