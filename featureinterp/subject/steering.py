"""A subject model that writes while a direction is added to its residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from featureinterp.errors import IncompatibleError
from featureinterp.subject.hooks import replaced

Units = Callable[[Float[Tensor, "batch token d_model"]], Float[Tensor, "batch token"]]
"""What a direction is multiplied by at each token: a function of the residual stream."""


@contextmanager
def added(
    model: torch.nn.Module,
    hook: str,
    vector: Float[Tensor, " d_model"] | None,
    units: Units | None = None,
) -> Iterator[None]:
    """Within the block, ``vector``, times each token's own ``units`` where they are given, is added
    to the residual stream at ``hook``, at every token but a text's first, the attention sink; the first pass
    begins texts, and a later pass of one token is taken to go on behind others. None, or zeros: nothing is
    hooked, and the model is exactly what it was. The hook is removed whatever happens."""
    if vector is None or not bool(vector.any()):
        yield
        return
    begins = True

    def add(residual: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        nonlocal begins
        if vector.shape != residual.shape[-1:]:
            raise IncompatibleError(
                f"a direction of {list(vector.shape)} cannot be added to a residual stream of width "
                f"{residual.shape[-1]}"
            )
        shift = vector.to(residual.device).float()
        if units is not None:
            shift = units(residual.float())[..., None] * shift
        moved = residual + shift.to(residual.dtype)
        if begins or residual.shape[1] > 1:
            moved = torch.cat([residual[:, :1], moved[:, 1:]], 1)
        begins = False
        return moved

    with replaced(model, hook, add):
        yield


@torch.inference_mode()
def write(
    model: Any,
    tokenizer: Any,
    hook: str,
    vector: Float[Tensor, " d_model"] | None,
    openings: Sequence[str],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    units: Units | None = None,
) -> list[str]:
    """One continuation of each opening, without the opening, at most ``max_tokens`` tokens. ``temperature``
    0: the likeliest token every time. The same arguments give the same texts. Openings of one length in
    tokens are written together."""
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = [bos + tokenizer.encode(opening, add_special_tokens=False) for opening in openings]
    texts = [""] * len(openings)
    for length in sorted({len(row) for row in ids}):
        group = [i for i, row in enumerate(ids) if len(row) == length]
        generators = [torch.Generator().manual_seed(seed + i) for i in group]
        with added(model, hook, vector, units):
            new = _continued(
                model,
                torch.tensor([ids[i] for i in group]),
                generators,
                max_tokens,
                temperature,
                tokenizer.eos_token_id,
            )
        for i, tokens in zip(group, new, strict=True):
            texts[i] = _text_after(tokenizer, ids[i], tokens)
    return texts


def _text_after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens that go on behind others. Decoded alone, many tokenizers would drop the space in
    front of the first."""

    def decoded(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    head, whole = decoded(before), decoded([*before, *tokens])
    return whole[len(head) :] if whole.startswith(head) else decoded(tokens)


def _continued(
    model: Any,
    ids: Int64[Tensor, "text token"],
    generators: Sequence[torch.Generator],
    max_tokens: int,
    temperature: float,
    end: int | None,
) -> list[list[int]]:
    """What follows each row of ``ids``, up to its end token; each row has its own luck."""
    found: list[list[int]] = [[] for _ in generators]
    going = set(range(len(found)))
    past, step = None, ids
    for _ in range(max_tokens):
        out = model(input_ids=step.to(model.device), past_key_values=past, use_cache=True, logits_to_keep=1)
        past, logits = out.past_key_values, out.logits[:, -1].float().cpu()
        if temperature > 0:
            chances = torch.softmax(logits / temperature, -1)
            tokens = [
                int(torch.multinomial(row, 1, generator=g))
                for row, g in zip(chances, generators, strict=True)
            ]
        else:
            tokens = logits.argmax(-1).tolist()
        going -= {i for i in going if tokens[i] == end}
        for i in going:
            found[i].append(tokens[i])
        if not going:
            break
        step = torch.tensor(tokens)[:, None]
    return found


def random_directions(d: int, n: int, *, seed: int) -> Float32[Tensor, "{n} {d}"]:
    """``n`` directions of unit length, uniform on the sphere."""
    found = [
        torch.randn(d, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
        for number in range(n)
    ]
    return torch.nn.functional.normalize(torch.stack(found), dim=1)
