"""Activation stores: whole, of the right tokens, of the right layer, mixed, without sinks, with nothing held
out twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from featureinterp.codes.collect import SINK_FACTOR
from featureinterp.corpus.windows import WindowTable
from featureinterp.errors import FeatureInterpError
from featureinterp.subject.load import Subject, same_weights
from featureinterp.training.asked import WHOLE, check_said
from featureinterp.training.doctor.check import Sheet
from featureinterp.training.doctor.model import FAR, hidden_states, relative, repeats
from featureinterp.training.store import ActivationStore

SAMPLE = 50_000
WINDOWS = 8
SHIFTS = 99
SINK_SHARE = 0.02
LONG = 500
"""No token has so many characters that are not white space."""
MASSIVE, GAMMA, SPREAD = 0.3, 10.0, 20.0
"""Worth a warning: the share of the variance in one channel, ‖mean‖ / ‖deviation‖, the norm of the 99th
percentile over the median.
"""


def look_at_store(
    sheet: Sheet, folder: Path, windows: WindowTable | None, subject: Subject | None, *, seed: int = 0
) -> ActivationStore | None:
    """All checks of one store; the store, when it is whole."""
    held: list[ActivationStore] = []

    def open_store() -> None:
        store = ActivationStore.open(folder)
        store.check()
        held.append(store)

    if not sheet.attempt("the store is whole", open_store):
        return None
    store = held[0]
    sheet.passed(
        "the store is whole",
        f"{len(store):,} rows of width {store.d_model} in {len(store.shards)} shards, {store.meta['dtype']}",
    )
    if not len(store):
        sheet.fail("it is not empty", "no rows", "extract again with more text")
        return None
    rng = np.random.default_rng(seed)
    if not finite(sheet, store) or not sheet.attempt(
        "it is of this model and corpus", lambda: check_said(store.meta, folder, WHOLE)
    ):
        return store
    provenance(sheet, store, windows, subject)
    tokens(sheet, store, windows)
    sample = store.read(np.sort(rng.choice(len(store), min(SAMPLE, len(store)), replace=False)))
    shape(sheet, sample)
    order(sheet, store, rng)
    if subject is not None and windows is not None and store.d_model == subject.d_model:
        recompute(sheet, store, windows, subject, rng)
    else:
        sheet.skipped("rows are the model's own", "needs the model and the windows")
    return store


def finite(sheet: Sheet, store: ActivationStore) -> bool:
    """No row is NaN or infinite; all are looked at."""
    for number, shard in enumerate(store.shards):
        for start in range(0, len(shard), 65_536):
            block = shard[start : start + 65_536]
            bad = ~np.isfinite(block).all(1)
            if bad.any():
                row = start + int(bad.argmax())
                figure = f"row {row} of shard {number} is the first of {int(bad.sum())} there"
                sheet.fail(
                    "all rows are finite",
                    figure,
                    "extract again: run the model in bfloat16 or float32, and store float32 where values "
                    "exceed 65,504",
                )
                return False
    sheet.passed("all rows are finite")
    return True


def provenance(
    sheet: Sheet, store: ActivationStore, windows: WindowTable | None, subject: Subject | None
) -> None:
    """What the store says that it was made of is what is here."""
    source = store.meta["source"]
    wrong = []
    if subject is not None:
        if not same_weights(subject.model, source["model"]):
            wrong.append(
                f"the model is not {source['model']['name']} in {source['model']['dtype']}, whose rows "
                "these are"
            )
        if source["tokenizer"] != subject.encoder.fingerprint:
            wrong.append("the tokenizer is another one")
    if windows is not None and source["corpus"]["windows"] != windows.fingerprint:
        wrong.append("the windows are others")
    if subject is None and windows is None:
        sheet.skipped("it is of this model and corpus", "neither is given")
        return
    sheet.judge(
        "it is of this model and corpus",
        not wrong,
        "; ".join(wrong) or "hashes match",
        "an existing folder proves nothing: extract again",
    )


def tokens(sheet: Sheet, store: ActivationStore, windows: WindowTable | None) -> None:
    """Every valid token is there, once, and nothing else."""
    counts, n = store.meta["counts"], len(store)
    left_out = counts["n_first"] + counts["n_sinks"]
    figure = f"{n:,} rows of {counts['n_tokens']:,} tokens, {left_out:,} left out as sinks"
    expected = counts["n_tokens"]
    if windows is not None:
        own = np.unique(store.windows)
        own = own[(own >= 0) & (own < len(windows))]
        expected = max(expected, int(np.asarray(windows.lengths)[own].sum()))
    missing = expected - n - left_out
    merged = store.meta["part"].get("merged", 1)
    advice = f"rows of {'a worker' if merged > 1 else 'some tokens'} are missing: extract or merge again"
    if missing > 0 and windows is not None and _starts_are_missing(store):
        advice = (
            "what is missing stands at the beginning of windows: this is a loss mask (a prompt is not "
            "learned), and the store needs the mask of valid tokens"
        )
    sheet.judge(
        "every valid token is there",
        missing == 0,
        figure if missing == 0 else f"{figure}; {abs(missing):,} {'missing' if missing > 0 else 'too many'}",
        advice,
    )
    ids, places = np.asarray(store.tokens), np.asarray(store.offsets)
    padding = ids < 0
    if windows is not None:
        rows = np.clip(np.asarray(store.windows), 0, len(windows) - 1)
        padding |= places >= np.asarray(windows.lengths)[rows]
    twice = n - len(
        np.unique(np.asarray(store.windows, np.int64) * (int(places.max(initial=0)) + 1) + places)
    )
    sheet.judge(
        "no padding is stored",
        not padding.any(),
        f"{int(padding.sum()):,} rows of padding",
        "padding is no text: mask it when the rows are written",
    )
    sheet.judge(
        "no token is stored twice",
        twice == 0,
        f"{twice:,} rows are repeated",
        "some windows were extracted or merged twice: extract again",
    )


def _starts_are_missing(store: ActivationStore) -> bool:
    """Whether windows begin late: the first row of most of them is beyond the second token."""
    _, first = np.unique(store.windows, return_index=True)
    # rows of a window are stored in the order of its tokens
    return bool((np.asarray(store.offsets)[first] > 1).mean() > 0.5)


def shape(sheet: Sheet, sample: np.ndarray) -> None:
    """Sinks, norms, channels and the mean: what decides about masks and normalisation."""
    norms = np.linalg.norm(sample, axis=1)
    median = float(np.median(norms))
    sinks = norms > SINK_FACTOR * median
    share = float((norms[sinks] ** 2).sum() / (norms**2).sum())
    figure = (
        f"{int(sinks.sum())} of {len(norms):,} rows are {SINK_FACTOR:g} times longer than the median, "
        f"with {share:.1%} of the squared norm"
    )
    advice = (
        "they carry the variance without meaning: extract with the mask of this project, or leave out "
        "position 0"
    )
    sheet.judge("no attention sinks are in it", share < SINK_SHARE, figure, advice)
    kept = sample[~sinks]
    spread = float(np.percentile(np.linalg.norm(kept, axis=1), 99) / median)
    advice = "tokens of large norm decide the loss: consider sae.normalize = 'token'"
    sheet.judge(
        "norms are alike",
        spread < SPREAD,
        f"99th percentile {spread:.2g} times the median {median:.4g}",
        advice,
        otherwise="warn",
    )
    variance = kept.var(0, dtype=np.float64)
    channel = int(variance.argmax())
    massive = float(variance[channel] / max(variance.sum(), 1e-30))
    advice = f"channel {channel} alone decides the loss: normalise, or look at the reconstruction without it"
    sheet.judge(
        "no channel dominates",
        massive < MASSIVE,
        f"channel {channel} has {massive:.1%} of the variance",
        advice,
        otherwise="warn",
    )
    gamma = float(np.linalg.norm(kept.mean(0, dtype=np.float64)) / max(float(variance.sum()) ** 0.5, 1e-30))
    advice = "the mean dwarfs the rest: keep the pre-bias from a presample of several shards"
    sheet.judge(
        "the mean does not dwarf the rest",
        gamma < GAMMA,
        f"‖mean‖ / ‖deviation‖ = {gamma:.2f}",
        advice,
        otherwise="warn",
    )


def order(sheet: Sheet, store: ActivationStore, rng: np.random.Generator) -> None:
    """Whether shards differ more than shards of windows at random would: then training sees one part of the
    corpus after the other.
    """
    name = "shards are mixed"
    if len(store.shards) < 2:
        sheet.skipped(name, "there is one shard, which is shuffled as a whole")
        return
    per = max(1, SAMPLE // len(store.shards))
    shard, rows = [], []
    for number, (a, b) in enumerate(zip(store.edges[:-1], store.edges[1:], strict=True)):
        picked = np.arange(a, b) if b - a <= per else np.sort(rng.choice(np.arange(a, b), per, replace=False))
        rows.append(picked)
        shard.append(np.full(len(picked), number))
    at, of = np.concatenate(rows), np.concatenate(shard)
    values = store.read(at)
    windows, member = np.unique(np.asarray(store.windows)[at], return_inverse=True)
    sums = _sums(values - values.mean(0), member, len(windows))
    sizes = np.bincount(member).astype(float)
    home = np.zeros(len(windows), np.int64)
    home[member] = of
    between = _between(sums, sizes, home, len(store.shards))
    total = float(((values - values.mean(0)) ** 2).sum())
    null = np.array([_between(sums, sizes, rng.permutation(home), len(store.shards)) for _ in range(SHIFTS)])
    p = (1 + int((null >= between).sum())) / (SHIFTS + 1)
    ratio = between / max(float(null.mean()), 1e-30)
    figure = (
        f"shard means differ {ratio:.1f} times as much as by chance (p {p:.2f}), "
        f"{between / total:.2%} of the variance"
    )
    advice = (
        "they are in the order of the corpus: extract with store.shuffle, or train with training.mix "
        "≥ 10 and training.presample from several shards"
    )
    sheet.judge(
        name,
        p > 0.01 or ratio < 2,
        figure if p <= 0.01 and ratio >= 2 else f"{figure}; mixing is not needed",
        advice,
    )


def _between(sums: np.ndarray, sizes: np.ndarray, home: np.ndarray, n: int) -> float:
    """Σ over shards of size · ‖mean‖², of centred rows given as sums by window."""
    total = _sums(sums, home, n)
    size = np.bincount(home, sizes, n)
    return float(((total**2).sum(1) / np.maximum(size, 1)).sum())


def _sums(rows: np.ndarray, group: np.ndarray, n: int) -> np.ndarray:
    """Sums of rows by group, float64 ``[n, d]``."""
    from scipy.sparse import csr_matrix

    found: np.ndarray = csr_matrix(
        (np.ones(len(rows)), (group, np.arange(len(rows)))), shape=(n, len(rows))
    ) @ rows.astype(np.float64)
    return found


def recompute(
    sheet: Sheet, store: ActivationStore, windows: WindowTable, subject: Subject, rng: np.random.Generator
) -> None:
    """Some windows are run again: rows must be those of the hook's layer, at their own tokens."""
    name, hook = "rows are the model's own", store.meta["hook"]
    own = np.unique(store.windows)
    own = own[(own >= 0) & (own < len(windows))]
    picked = rng.choice(own, min(WINDOWS, len(own)), replace=False)
    layers = shifts = None
    at_hook: list[tuple[np.ndarray, np.ndarray]] = []
    for window in picked:
        rows = np.flatnonzero(np.asarray(store.windows) == window)
        places = np.asarray(store.offsets)[rows]
        ids = torch.from_numpy(np.array(windows.ids(int(window)), np.int64))[None]
        inside = (places >= 1) & (places < ids.shape[1] - 1)
        rows, places = rows[inside], places[inside]
        if not len(rows):
            continue
        stored = store.read(rows)
        try:
            states = [s[0].cpu().numpy() for s in hidden_states(subject, ids)]
            exact = subject.residual(ids, hook)[0].float().cpu().numpy()
        except FeatureInterpError as error:
            sheet.fail(name, "", str(error))
            return
        by_layer = np.array([relative(s[places], stored) for s in states])
        by_shift = np.array([relative(exact[places + shift], stored) for shift in (-1, 0, 1)])
        layers = by_layer if layers is None else layers + by_layer
        shifts = by_shift if shifts is None else shifts + by_shift
        at_hook.append((exact[places], stored))
    if layers is None or shifts is None:
        sheet.skipped(name, "no window with tokens of the store could be run")
        return
    n = len(at_hook)
    off = float(shifts[1] / n)
    if off < FAR:
        sheet.passed(name, f"{n} windows run again, relative difference {off:.2g}")
        return
    _explain_difference(sheet, name, off, layers / n, shifts / n, subject.check_hook(hook))


def _explain_difference(
    sheet: Sheet, name: str, off: float, layers: np.ndarray, shifts: np.ndarray, block: int
) -> None:
    best_shift, best_layer = int(shifts.argmin()) - 1, int(layers.argmin())
    figure = f"relative difference {off:.2g} at the hook"
    if best_shift and shifts.min() < FAR:
        side = "before" if best_shift < 0 else "after"
        sheet.fail(
            name,
            f"{figure}, {shifts.min():.2g} one token {side}",
            "rows are misaligned by one token: the BOS was counted, or offsets begin at 1",
        )
    elif best_layer != block + 1 and layers.min() < FAR:
        found = (
            f"{figure}, {layers.min():.2g} after block {best_layer - 1}"
            if best_layer
            else f"{figure}, {layers.min():.2g} at the embedding"
        )
        sheet.fail(
            name,
            found,
            f"rows are of hidden state {best_layer} instead of {block + 1}: entry 0 is the embedding, so "
            "block i is entry i + 1",
        )
    else:
        sheet.fail(
            name,
            figure,
            "rows were made by other weights, in another dtype, or are damaged (bfloat16 bits read as "
            "float16, for instance): extract again",
        )


def look_at_windows(sheet: Sheet, windows: WindowTable) -> None:
    """Windows differ, and no token has the text of many."""
    repeats(sheet, windows.contents)
    sizes = np.diff(np.asarray(windows.ends[:SAMPLE], np.int64), axis=1, prepend=0)
    long = next(
        (
            len(piece)
            for row in np.flatnonzero((sizes > LONG).any(1))
            for p in windows.pieces(int(row))
            if len(piece := p.strip()) > LONG
        ),
        0,
    )
    n_chars = int(sizes.sum())
    n_tokens = int(np.asarray(windows.lengths[:SAMPLE]).sum())
    figure = f"{n_chars / max(1, n_tokens):.1f} characters per token" + (
        f", and one token with {long:,}" if long else ""
    )
    advice = (
        "the tokenizer cut the texts (truncation in its file), and the rest hangs on the last token: "
        "extract again"
    )
    sheet.judge("tokens cover the text", not long, figure, advice)
    for note in windows.notes:
        sheet.warn("the text is as asked for", note, "look at the corpus, or ask for less")


def look_at_split(
    sheet: Sheet, train: ActivationStore, test: ActivationStore, windows: WindowTable | None
) -> None:
    """Nothing that is evaluated was trained on."""
    shared = np.intersect1d(np.unique(train.documents), np.unique(test.documents))
    n = len(np.unique(test.documents))
    advice = "split by documents, not by rows or windows: extract with --held-out"
    sheet.judge(
        "held-out documents are held out",
        not len(shared),
        f"{len(shared)} of {n} held-out documents are also in training",
        advice,
    )
    if windows is None:
        return
    mine, theirs = (_contents(windows, np.unique(s.windows)) for s in (test, train))
    known = set(theirs)
    copied = sum(c in known for c in mine)
    advice = "the corpus holds the same text in several documents: remove repeated documents"
    sheet.judge(
        "held-out text is new",
        copied <= 0.01 * len(mine),
        f"{copied} of {len(mine)} held-out windows are also in training, word for word",
        advice,
        otherwise="warn",
    )


def _contents(windows: WindowTable, rows: Sequence[int] | np.ndarray) -> list[bytes]:
    return [windows.ids(int(r)).tobytes() for r in rows if 0 <= r < len(windows)]
