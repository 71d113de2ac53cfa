"""Residual-stream hooks by the names that the field uses, on any decoder of the Hugging Face library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featureinterp.errors import IncompatibleError, UnknownNameError

_NAME = re.compile(r"blocks\.(\d+)\.hook_resid_post")


class _LibraryModel(Protocol):
    """What models of the Hugging Face library have besides what torch knows of."""

    config: Any

    def get_input_embeddings(self) -> nn.Embedding: ...


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's language part."""
    return cast(_LibraryModel, model).config.get_text_config()


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """What makes vectors of token ids."""
    return cast(_LibraryModel, model).get_input_embeddings()


class _Reached(Exception):  # noqa: N818 (a signal, not an error)
    """Ends the forward pass once the last hooked block has run."""


def block_of(hook: str, n_blocks: int) -> int:
    """The 0-based block of ``blocks.{i}.hook_resid_post``, the residual stream after block i.

    Raises ``UnknownNameError`` when the name has another form or the model has no such block.
    """
    match = _NAME.fullmatch(hook)
    if match is None or int(match[1]) >= n_blocks:
        raise UnknownNameError(
            f"the model has no hook {hook!r}: it has blocks.0.hook_resid_post to "
            f"blocks.{n_blocks - 1}.hook_resid_post"
        )
    return int(match[1])


def find_blocks(model: nn.Module, n_blocks: int) -> nn.ModuleList:
    """The list of decoder blocks: the first ``ModuleList`` of the model whose length is the number of
    blocks.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks and "vision" not in name:
            return module
    raise UnknownNameError(
        f"{type(model).__name__} has no list of {n_blocks} decoder blocks: this architecture is not supported"
    )


def residual_after(
    model: nn.Module, block: nn.Module, inputs: dict[str, Any]
) -> Float[Tensor, "batch token d_model"]:
    """Runs ``model(**inputs)`` up to ``block`` and returns that block's output.

    No later block, no final norm and no logits are computed. The hook is removed whatever happens.
    """
    return residuals_after(model, [block], inputs)[0]


def residuals_after(
    model: nn.Module, blocks: Sequence[nn.Module], inputs: dict[str, Any]
) -> list[Float[Tensor, "batch token d_model"]]:
    """The same for several blocks, in the order in which they run, in one pass up to the last."""
    found: list[torch.Tensor] = []

    def keep(block: nn.Module, _args: Any, output: Any) -> None:
        found.append(residual_in(output, block))
        if len(found) == len(blocks):
            raise _Reached

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        model(**inputs)
    except _Reached:
        return found
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError("the forward pass ended without reaching the hooked block")


def residual_in(output: object, block: nn.Module) -> Float[Tensor, "batch token d_model"]:
    """The residual stream in what a block puts out. Raises ``IncompatibleError`` when there is none."""
    found = output[0] if isinstance(output, tuple) and output else output
    if isinstance(found, torch.Tensor) and found.ndim == 3:
        return found
    form = f"shape {list(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
    raise IncompatibleError(
        f"the blocks of this model ({type(block).__name__}) put out {form} instead of one residual stream "
        "[batch, token, width]: it is not supported"
    )


Change = Callable[[Float[Tensor, "batch token d_model"]], Float[Tensor, "batch token d_model"]]


@contextmanager
def replaced(model: nn.Module, hook: str, change: Change) -> Iterator[None]:
    """Within the block, the residual stream at ``hook`` goes through ``change``. The hook is removed
    whatever happens.
    """
    n_blocks = int(text_config(model).num_hidden_layers)
    block = find_blocks(model, n_blocks)[block_of(hook, n_blocks)]

    def other(block: nn.Module, _args: Any, output: Any) -> Any:
        changed = change(residual_in(output, block))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = block.register_forward_hook(other)
    try:
        yield
    finally:
        handle.remove()
