"""Cutting a corpus into the files of a table of windows, in bounded memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featureinterp.corpus.cut import Available, TextEncoder, cuts
from featureinterp.corpus.quota import UNKNOWN, Plan, Seen, lacks_much, next_plan
from featureinterp.corpus.text import Corpus
from featureinterp.errors import (
    CorpusError,
)
from featureinterp.stored.sums import SummedFile, Sums

if TYPE_CHECKING:
    from featureinterp.corpus.windows import WindowPolicy

STREAMED_WINDOWS_PER_DOCUMENT = 8
ARRAYS = {
    "tokens": np.int32,
    "ends": np.uint32,
    "lengths": np.int32,
    "documents": np.int32,
    "starts": np.int64,
    "chars": np.int64,
    "spans": np.int64,
}


def write_table(
    corpus: Corpus, encoder: TextEncoder, policy: WindowPolicy, folder: Path
) -> tuple[dict[str, Any], dict[str, Sums]]:
    """Writes the table in as many passes as the number of tokens that was asked for needs."""
    plan: Plan | None = None
    known = Seen()
    for number in itertools.count(1):
        meta, files, seen = _write_once(corpus, encoder, policy, folder, plan)
        seen.learn(known)
        known, plan = seen, None
        if policy.max_tokens is not None:
            plan = next_plan(
                seen, meta["n_tokens"], policy.max_tokens, policy.length, policy.max_per_document, number
            )
        if plan is None:
            break
    if not meta["n_windows"]:
        raise CorpusError(
            f"the corpus {corpus.name} gives no window of at least {policy.min_length} tokens: is it empty?"
        )
    return {**meta, "notes": list(_notes(corpus, policy, meta["n_tokens"]))}, files


def _notes(corpus: Corpus, policy: WindowPolicy, n_tokens: int) -> Iterator[str]:
    """What a user should know of the reading."""
    if policy.max_tokens is not None and lacks_much(n_tokens, policy.max_tokens, policy.length):
        limit = f", at most {policy.max_per_document} of one document" if policy.max_per_document else ""
        windows = f"windows of {policy.min_length} to {policy.length} tokens{limit}"
        yield f"the corpus gives {n_tokens:,} of the {policy.max_tokens:,} tokens asked for ({windows})"
    if corpus.tally.n_null:
        yield f"{corpus.tally.n_null:,} of the rows that were read have no text (null) and are left out"
    if corpus.unread:
        more = f" and {len(corpus.unread) - 5} more" if len(corpus.unread) > 5 else ""
        yield f"not read as documents: {', '.join(corpus.unread[:5])}{more} in {corpus.name}"


def _write_once(
    corpus: Corpus, encoder: TextEncoder, policy: WindowPolicy, folder: Path, plan: Plan | None
) -> tuple[dict[str, Any], dict[str, Sums], Seen]:
    digest = hashlib.sha256()
    seen = Seen()
    n_windows = n_tokens = span = 0
    with ExitStack() as stack:
        paths = [*(f"{name}.bin" for name in ARRAYS), "text.bin", "documents.jsonl"]
        files = {name: SummedFile(stack.enter_context((folder / name).open("wb"))) for name in paths}

        def put(name: str, value: Any) -> None:
            files[f"{name}.bin"].write(np.asarray(value, ARRAYS[name]).tobytes())

        put("spans", 0)
        for number, document in enumerate(corpus):
            if plan.ends(number) if plan else policy.max_tokens is not None and n_tokens >= policy.max_tokens:
                break
            quota = plan.quota(number) if plan else _quota(policy, corpus.n_documents, number, n_tokens)
            has, before = Available(), n_windows
            for cut in cuts(document.text, encoder, policy.length, policy.min_length, quota, has):
                pad = policy.length - len(cut.ids)
                data = cut.text.encode()
                span += len(data)
                ids = np.pad(np.asarray(cut.ids, np.int32), (0, pad), constant_values=-1)
                put("tokens", ids)
                put("ends", np.pad(cut.ends, (0, pad), mode="edge"))
                put("lengths", len(cut.ids))
                put("documents", number)
                put("starts", cut.start)
                put("chars", cut.char)
                put("spans", span)
                files["text.bin"].write(data)
                digest.update(ids.tobytes() + data + number.to_bytes(8, "little"))
                n_windows += 1
                n_tokens += len(cut.ids)
            if plan:
                plan.took(number, n_windows - before)
            seen.add(UNKNOWN if quota == 0 else has.windows, has.tokens, n_windows - before)
            files["documents.jsonl"].write((json.dumps(document.id) + "\n").encode())
    meta = {
        "n_windows": n_windows,
        "n_tokens": n_tokens,
        "n_documents": len(seen.taken),
        "fingerprint": digest.hexdigest(),
    }
    return meta, {name: file.sums for name, file in files.items()}, seen


def _quota(policy: WindowPolicy, n_documents: int | None, done: int, taken: int) -> int | None:
    """How many windows the next document may give; None: all of them. What short documents left over goes to
    later ones.
    """
    if policy.max_tokens is None:
        return policy.max_per_document
    if n_documents is None:
        left = math.ceil((policy.max_tokens - taken) / policy.length)
        return min(policy.max_per_document or STREAMED_WINDOWS_PER_DOCUMENT, left)
    due = policy.max_tokens * (done + 1) / n_documents - taken
    quota = max(0, round(due / policy.length))
    return quota if policy.max_per_document is None else min(quota, policy.max_per_document)
