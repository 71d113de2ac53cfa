"""Before anything is extracted: the model, its hook, its tokenizer, and the corpus."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featureinterp.corpus.contents import hashes_of, repeated_share
from featureinterp.corpus.cut import piece_ends
from featureinterp.corpus.text import Corpus
from featureinterp.files import valid_unicode
from featureinterp.subject.load import PrependToken, Subject, as_subject, check_causal, read_causal_lm
from featureinterp.training.doctor.check import Sheet
from featureinterp.training.settings import TrackingTable

TEXT = "The committee met in 1849; its report, in three parts, was read aloud."
ODD = "naïve café — 25 % “quoted” 日本の港 👩‍👧 e\u0301 end"
DOCUMENTS = 20
DOCUMENT_CHARS = 20_000
REPEATED = 0.05
"""So large a share of windows with the text of another is worth a warning."""
FAR = 0.02
"""Relative difference of activations that rounding of half-precision weights does not reach."""


def look_at_model(
    sheet: Sheet, name: str, hook: str, *, device: str | None, dtype: str | None, window: int
) -> Subject | None:
    """The model loads whole, computes finite activations, and its hook is where its name says. The subject,
    for what comes after; None when it cannot be had."""
    held: list[Any] = []

    def load() -> None:
        held.extend(read_causal_lm(name, device=device, dtype=dtype))

    if not sheet.attempt("the model loads", load):
        return None
    model, tokenizer, missing = held
    n = sum(p.numel() for p in model.parameters())
    constant = [key for key, p in model.named_parameters() if p.ndim > 1 and float(p.float().std()) == 0]
    sheet.judge(
        "its checkpoint is whole",
        not missing and not constant,
        f"{n:,} weights"
        if not missing
        else f"{len(missing)} weights are not in the checkpoint, such as {missing[0]}",
        "the missing or constant weights are random or empty, and so is what comes out: convert the "
        "checkpoint again and compare its size with the original's",
    )
    subject = as_subject(name, model, tokenizer)
    if not sheet.attempt("the hook exists", lambda: _hook(sheet, subject, hook)):
        return None
    rows, highest = subject.n_embeddings, max(tokenizer.get_vocab().values(), default=0)
    sheet.judge(
        "its tokens are in its embedding",
        highest < rows,
        f"{rows:,} rows, the highest token is {highest:,}",
        "the tokenizer is of another model, or has tokens that were added later: text that gives them is "
        "refused",
        otherwise="warn",
    )
    ids = torch.tensor([subject.encoder.encode([TEXT])[0].ids])
    read: list[torch.Tensor] = []
    if not sheet.attempt("it reads text", lambda: read.append(subject.residual(ids, hook).float())):
        return None
    if not sheet.attempt("tokens see only what is before them", lambda: check_causal(subject)):
        return None
    residual = read[0]
    finite = bool(torch.isfinite(residual).all())
    sheet.judge(
        "its activations are finite",
        finite,
        f"largest {float(residual.abs().max()):.4g}",
        "run it in float32 or bfloat16: float16 overflows in some models",
    )
    if finite:
        _index(sheet, subject, hook, ids)
    context = subject.context_length
    needed = window + isinstance(subject.sink, PrependToken)
    sheet.judge(
        "windows fit its context",
        context is None or needed <= context,
        f"{needed} of {context or 'unlimited'} tokens",
        f"choose a window of at most {(context or needed) - (needed - window)} tokens",
    )
    return subject


def _hook(sheet: Sheet, subject: Subject, hook: str) -> None:
    block = subject.check_hook(hook)
    sheet.passed("the hook exists", f"block {block} of {subject.n_blocks}")


def _index(sheet: Sheet, subject: Subject, hook: str, ids: torch.Tensor) -> None:
    """The residual stream after block i is entry i + 1 of the library's hidden states, whose entry 0 is the
    embedding; the last has the final norm applied.
    """
    block = subject.check_hook(hook)
    states = hidden_states(subject, ids)
    found = subject.residual(ids, hook).float()
    nearest = min(range(len(states)), key=lambda i: relative(states[i], found))
    if block == subject.n_blocks - 1:
        sheet.skipped(
            "the layer index is the library's",
            "the last block's hidden state has the final norm applied, and cannot be compared",
        )
        return
    figure = (
        f"equals hidden state {nearest} (0: the embedding), relative difference "
        f"{relative(states[nearest], found):.2g}"
    )
    sheet.judge(
        "the layer index is the library's",
        nearest == block + 1,
        figure,
        f"hook {hook} should be hidden state {block + 1}: this architecture counts otherwise",
    )


@torch.inference_mode()
def hidden_states(subject: Subject, ids: torch.Tensor) -> list[torch.Tensor]:
    """All hidden states of the library for windows ``[window, token]``, each ``[window, token, d]`` without
    the BOS, float32.
    """
    ids, cut = subject.as_read(ids)
    states = subject.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    return [state[:, cut:].float() for state in states]


def relative(a: torch.Tensor | np.ndarray, b: torch.Tensor | np.ndarray) -> float:
    """‖a − b‖ / ‖b‖."""
    x, y = torch.as_tensor(a).double().cpu(), torch.as_tensor(b).double().cpu()
    return float((x - y).norm() / y.norm().clamp_min(1e-12))


def repeats(sheet: Sheet, hashes: np.ndarray) -> None:
    """Windows have texts of their own."""
    share = repeated_share(hashes)
    advice = (
        "the same text would be on both sides of a split, and is left out of one: remove repeated "
        "documents and common headers"
    )
    sheet.judge(
        "windows differ",
        share <= REPEATED,
        f"{share:.1%} of {len(hashes):,} windows have the text of another",
        advice,
        otherwise="warn",
    )


def look_at_corpus(sheet: Sheet, corpus: Corpus, subject: Subject | None, window: int = 64) -> None:
    """The corpus holds text of the format that it claims, and tokens know their characters."""
    texts: list[str] = []

    def read() -> None:
        for document in corpus:
            if document.text.strip():
                texts.append(valid_unicode(document.text[:DOCUMENT_CHARS]))
            if len(texts) == DOCUMENTS:
                break

    if not sheet.attempt("it can be read", read):
        return
    sheet.judge(
        "it is not empty",
        bool(texts),
        f"{sum(map(len, texts)):,} characters in the first {len(texts)} documents",
        "name a corpus with text in it",
    )
    twice = len(texts) - len(set(texts))
    sheet.judge(
        "documents differ",
        twice * 10 <= len(texts),
        f"{twice} of the first {len(texts)} are repeated",
        "remove repeated documents: held-out ones would not be",
        otherwise="warn",
    )
    if subject is None or not texts:
        return
    ids = [np.asarray(encoding.ids, np.int32) for encoding in subject.encoder.encode(texts)]
    whole = [part[: len(part) // window * window].reshape(-1, window) for part in ids]
    repeats(sheet, hashes_of(np.concatenate(whole)))
    offsets(sheet, subject.encoder, subject.tokenizer, [*texts, ODD])


def _uncovered(text: str, spans: Sequence[tuple[int, int]]) -> int:
    """How many characters that are not white space are in no token's span."""
    covered = np.zeros(len(text) + 1, np.int64)
    for start, end in spans:
        covered[start] += 1
        covered[end] -= 1
    return sum(
        not c.isspace() for c, inside in zip(text, covered.cumsum().tolist(), strict=False) if not inside
    )


def offsets(sheet: Sheet, encoder: Any, tokenizer: Any, texts: list[str]) -> None:
    """Pieces of text by the tokenizer's offsets join to the text, and each is what its token decodes to."""
    n = wrong = broken = n_tokens = n_chars = uncovered = 0
    example = ""
    for text, encoding in zip(texts, encoder.encode(texts), strict=True):
        ends = piece_ends(text, encoding.offsets).tolist()
        pieces = [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        broken += "".join(pieces) != text
        n_tokens += len(encoding.ids)
        n_chars += len(text)
        uncovered += _uncovered(text, encoding.offsets)
        for piece, token in zip(pieces, encoding.ids, strict=True):
            if piece.isascii() and piece.strip():
                n += 1
                decoded = tokenizer.decode([token]).replace(
                    "\ufffd", ""
                )  # a part of a character of several tokens
                if decoded.strip() != piece.strip():
                    wrong += 1
                    example = example or f"{piece!r} for {decoded!r}"
    share = wrong / max(1, n)
    sheet.judge(
        "tokens know their characters",
        not broken and share < 0.02,
        f"{wrong:,} of {n:,} tokens decode to other text than their offsets "
        f"say{', ' + example if example else ''}",
        "offsets and tokens do not belong together (by one, perhaps): examples would show the wrong words; "
        "use this model's own fast tokenizer",
    )
    sheet.judge(
        "tokens cover the text",
        uncovered <= 0.01 * n_chars,
        f"{n_tokens:,} tokens for {n_chars:,} characters, of which {uncovered:,} are in no token",
        "the tokenizer cuts texts or leaves characters out: use this model's own fast tokenizer",
    )


def look_at_environment(
    sheet: Sheet, tracking: TrackingTable, environment: Mapping[str, str] | None = None
) -> None:
    """A tracker's variables in the environment would override the configured account silently."""
    if tracking.to != "wandb":
        sheet.passed("no tracker is overridden", tracking.to)
        return
    environment = os.environ if environment is None else environment
    wrong = []
    for variable, configured in (
        ("WANDB_ENTITY", tracking.entity),
        ("WANDB_PROJECT", tracking.project),
        ("WANDB_NAME", tracking.name),
    ):
        value = environment.get(variable)
        if value is not None and value != configured:
            wrong.append(f"{variable} = {value!r} against {configured!r}")
    if "WANDB_API_KEY" in environment and (Path.home() / ".netrc").exists():
        wrong.append("WANDB_API_KEY takes the place of the account in .netrc")
    sheet.judge(
        "no tracker is overridden",
        not wrong,
        "; ".join(wrong) or "as configured",
        "unset the variable, or configure the same",
        otherwise="warn",
    )
