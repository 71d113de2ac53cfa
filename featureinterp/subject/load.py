"""Loading a subject model by the name of an embedded part, a hub name, or a folder."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from featureinterp.corpus.cut import Encoding
from featureinterp.errors import IncompatibleError, UnknownNameError
from featureinterp.machine import DTYPES, pick_device, pick_dtype
from featureinterp.machine.accelerator import to_device
from featureinterp.quiet import quiet_transformers
from featureinterp.subject.hooks import (
    block_of,
    find_blocks,
    input_embeddings,
    residual_after,
    residuals_after,
)

EMBEDDED = "smollm2-135m-instruct"
CAUSAL_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.02}
"""A change of earlier tokens, as a share of the deviation of all activations, that rounding does not reach.
"""
_OWNERS = {"pythia-160m-deduped": "EleutherAI", "gemma-2-2b": "google"}
"""Models that people name without their owner, because the SAEs of SAEBench and Gemma Scope do."""


@dataclass(frozen=True, slots=True)
class PrependToken:
    """The model reads this token (its BOS) before every window; its activations are never kept."""

    token_id: int


@dataclass(frozen=True, slots=True)
class SkipFirst:
    """The model has no BOS: every window is read as it is, and its own first token, the attention sink, is
    not scored.
    """


SinkPolicy = PrependToken | SkipFirst
"""What is done about position 0, where language models park attention on a token with a huge norm: it is
never scored.
"""


class HubTokenizer:
    """A fast tokenizer of the Hugging Face library as a :class:`TextEncoder`: text only, never special
    tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _backend(self) -> Any:
        """A copy of the fast tokenizer that encodes all of a text and nothing else: its file may say that
        texts are cut or padded.
        """
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's definition, without the cutting and padding that are never applied."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Ids and character spans of each text; what looks like a special token in it is encoded as text."""
        return list(self._backend.encode_batch(list(texts), add_special_tokens=False))


@dataclass(frozen=True)
class Subject:
    """A causal language model that is run up to a hook. ``d_model`` is the width of its residual stream."""

    name: str
    model: torch.nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    n_blocks: int
    d_model: int
    context_length: int | None
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def encoder(self) -> HubTokenizer:
        """Its tokenizer, for text."""
        return HubTokenizer(self.tokenizer)

    @cached_property
    def sink(self) -> SinkPolicy:
        """A BOS in front where the tokenizer has one, else the first token of every window goes unscored."""
        bos = self.tokenizer.bos_token_id
        return SkipFirst() if bos is None else PrependToken(int(bos))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every weight's name, shape and a sample of its values, and of the dtype it runs in."""
        return weights_fingerprint(self.model)

    def check_hook(self, hook: str) -> int:
        """The block of a hook's name; raises ``UnknownNameError`` when there is none."""
        return block_of(hook, self.n_blocks)

    def residual(self, ids: Int64[Tensor, "batch token"], hook: str) -> Float[Tensor, "batch token d_model"]:
        """The residual stream at ``hook`` for token ids, in the model's dtype.

        The sink policy is applied: a BOS is read first and its position is cut off; without one, position 0
        is part of the result and the caller must not score it.
        """
        return self.residuals(ids, [hook])[0]

    @torch.inference_mode()
    def residuals(
        self, ids: Int64[Tensor, "batch token"], hooks: Sequence[str]
    ) -> list[Float[Tensor, "batch token d_model"]]:
        """The same at several hooks, in the order of their blocks, in one pass."""
        blocks = find_blocks(self.model, self.n_blocks)
        wanted = [blocks[number] for number in sorted({self.check_hook(hook) for hook in hooks})]
        ids, cut = self.as_read(ids)
        return [
            residual[:, cut:]
            for residual in residuals_after(self.model, wanted, {"input_ids": ids, "use_cache": False})
        ]

    def as_read(self, ids: Int64[Tensor, "batch token"]) -> tuple[Int64[Tensor, "batch read"], int]:
        """The ids that the model reads, with its BOS in front where it has one, on its
        device; and how many were put in front.

        Raises ``IncompatibleError`` for a text that is longer than the context, and for ids that its
        embedding does not have.
        """
        lead = 0
        if isinstance(self.sink, PrependToken):
            ids, lead = torch.cat([ids.new_full((len(ids), 1), self.sink.token_id), ids], 1), 1
        if self.context_length is not None and ids.shape[1] > self.context_length:
            raise IncompatibleError(
                f"windows of {ids.shape[1]} tokens are longer than the context of {self.name} "
                f"({self.context_length}): use shorter windows"
            )
        highest = int(ids.max()) if ids.numel() else 0
        if highest >= self.n_embeddings:
            raise IncompatibleError(
                f"the tokenizer of {self.name} gives the token {highest}, and its embedding has "
                f"{self.n_embeddings:,} rows: they are not of one model"
            )
        return to_device(ids, self.device), lead

    @cached_property
    def n_embeddings(self) -> int:
        """Rows of its embedding: token ids must be below."""
        return len(input_embeddings(self.model).weight)


def check_causal(subject: Subject) -> None:
    """Raises ``IncompatibleError`` for a model whose tokens see those after them: after the first block,
    earlier tokens change when the last one does.
    """
    block = find_blocks(subject.model, subject.n_blocks)[0]
    other = min(7, subject.n_embeddings - 1)
    ids = torch.tensor(
        [[i % subject.n_embeddings for i in range(6)], [*(i % subject.n_embeddings for i in range(5)), other]]
    )
    with torch.inference_mode():
        one, two = residual_after(
            subject.model, block, {"input_ids": ids.to(subject.device), "use_cache": False}
        ).float()
    if float((one[:5] - two[:5]).abs().max()) > CAUSAL_TOLERANCE.get(subject.dtype, 0.02) * float(one.std()):
        raise IncompatibleError(
            f"{subject.name} is no causal language model (its tokens see the ones after them), and other "
            "kinds are not supported: choose one that writes text"
        )


def check_same_model(subject: Subject, recorded: Mapping[str, Any], what: str) -> None:
    """Raises ``IncompatibleError`` when ``what`` was made with another model than ``subject``. ``recorded``:
    its ``name`` and ``fingerprint``.
    """
    check_same_weights(subject.model, subject.name, recorded, what)


def check_same_weights(model: torch.nn.Module, name: str, recorded: Mapping[str, Any], what: str) -> None:
    """The same for a model by itself. It may run in another dtype than ``recorded``: its weights must be the
    recorded ones when they are cast to that.
    """
    if same_weights(model, recorded):
        return
    made_in = recorded.get("dtype")
    runs_in = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
    other = (
        f", or run it in {made_in} as they were, not in {runs_in}" if made_in and made_in != runs_in else ""
    )
    raise IncompatibleError(
        f"{what} were made with another model than {name!r} is: give the one that they name, "
        f"{recorded['name']!r}{other}"
    )


def same_weights(model: torch.nn.Module, recorded: Mapping[str, Any]) -> bool:
    """Whether a model has the recorded weights, in their dtype or when they are cast to it."""
    made_in = DTYPES.get(str(recorded.get("dtype")))
    return recorded["fingerprint"] in (weights_fingerprint(model), weights_fingerprint(model, made_in))


def weights_fingerprint(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over every parameter's name, shape, dtype and 32 evenly spaced values; of the weights cast to
    ``dtype`` when it is given.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[
            torch.linspace(0, max(flat.numel() - 1, 0), min(32, flat.numel()), dtype=torch.float64).long()
        ]
        sample = sample.to(dtype) if dtype is not None and sample.is_floating_point() else sample
        digest.update(
            f"{name}{tuple(weight.shape)}{sample.dtype}".encode() + sample.float().cpu().numpy().tobytes()
        )
    return digest.hexdigest()


def load_subject(
    name: str = EMBEDDED,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Loads a causal language model, of which only what is below its head must be in the checkpoint, and its
    tokenizer.

    ``name``: an embedded part, a Hugging Face model name, or a folder. ``dtype``: auto (bfloat16 where the
    device has it, else float32), bfloat16, float16 or float32.

    Raises ``UnknownNameError`` when there is no such model or it is no causal language model with a fast
    tokenizer, and ``IncompatibleError`` when its checkpoint is damaged or lacks weights.
    """
    model, tokenizer, missing = read_causal_lm(
        name, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    _check_whole(name, [key for key in missing if key.startswith(f"{model.base_model_prefix}.")])
    subject = as_subject(name, model, tokenizer)
    check_causal(subject)
    return subject


def as_subject(name: str, model: Any, tokenizer: Any) -> Subject:
    """The subject in a causal language model that :func:`load_causal_lm` gave."""
    config = model.config.get_text_config()
    return Subject(
        name=name,
        model=model.base_model,
        tokenizer=tokenizer,
        n_blocks=int(config.num_hidden_layers),
        d_model=int(config.hidden_size),
        context_length=usable_context(model.base_model, config),
        device=model.device,
        dtype=model.dtype,
    )


def usable_context(model: torch.nn.Module, config: Any) -> int | None:
    """How many tokens a model can read at once; None when nothing says so. Families that number positions
    from behind a padding position (RoBERTa) have that many less than rows of their table."""
    longest: int | None = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, torch.nn.Embedding)
            and module.padding_idx is not None
        ):
            usable = module.num_embeddings - module.padding_idx - 1
            longest = usable if longest is None else min(longest, usable)
    return longest


def load_causal_lm(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The whole model with its head, in evaluation mode, and its tokenizer. Arguments and errors as
    :func:`load_subject`.
    """
    model, tokenizer, missing = read_causal_lm(
        name, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    _check_whole(name, missing)
    return model, tokenizer


def read_causal_lm(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, list[str]]:
    """Model and tokenizer as :func:`load_causal_lm` gives them, and the parameters that the checkpoint lacks:
    the library filled them with random numbers.
    """
    target = pick_device(device)
    kind = pick_dtype(dtype, target)
    source = model_source(name)
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet_transformers():
        try:
            _check_kind(name, AutoConfig.from_pretrained(source, **options))
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model, info = AutoModelForCausalLM.from_pretrained(
                source, dtype=kind, output_loading_info=True, **options
            )
        except (OSError, ValueError, KeyError) as error:
            raise UnknownNameError(
                f"the model {name!r} cannot be loaded ({_reason(error)}): give {EMBEDDED!r}, a Hugging "
                "Face name of a causal language model, or a folder"
            ) from error
        except (RuntimeError, SafetensorError) as error:
            raise IncompatibleError(
                f"the checkpoint of {name!r} is damaged or does not fit its configuration "
                f"({_reason(error)}): fetch or convert it again"
            ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UnknownNameError(
            f"the tokenizer of {name!r} is not a fast one, so that exact token texts are not known: "
            "convert it to a tokenizer.json"
        )
    model.requires_grad_(False)
    return model.to(target).eval(), tokenizer, sorted(info["missing_keys"])


def _check_kind(name: str, config: Any) -> None:
    """Raises ``UnknownNameError`` for what the library would load as a causal language model though it was
    trained as another kind.
    """
    stated = [str(architecture) for architecture in getattr(config, "architectures", None) or ()]
    masked = any(architecture.endswith("ForMaskedLM") for architecture in stated) and not getattr(
        config, "is_decoder", False
    )
    if masked or getattr(config, "is_encoder_decoder", False):
        what = "a masked language model" if masked else "an encoder with a decoder"
        kind = f"{what} ({stated[0][:60] if stated else config.model_type})"
        raise UnknownNameError(
            f"the model {name!r} is {kind}, and only causal language models are supported: choose one that "
            "writes text"
        )


def _check_whole(name: str, missing: Sequence[str]) -> None:
    if missing:
        raise IncompatibleError(
            f"{len(missing)} weights of {name!r} are not in its checkpoint, such as {missing[0]}, and "
            "would be random: convert it again"
        )


def _reason(error: Exception) -> str:
    """The first line of what a library says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def load_tokenizer(name: str) -> Any:
    """The tokenizer of an embedded model, a hub name or a folder. Raises ``UnknownNameError`` when it cannot
    be had.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(model_source(name))
    except (OSError, ValueError) as error:
        raise UnknownNameError(
            f"the tokenizer of {name!r} cannot be loaded: give the Hugging Face name or folder that has "
            "it, as 'tokenizer' of the endpoint"
        ) from error


def model_source(name: str) -> str:
    """What ``from_pretrained`` is given for a name: the cache folder of an embedded part, a folder, or the
    hub name itself.
    """
    from featureinterp.assets import PARTS
    from featureinterp.subject.gguf import hugging_face_folder

    if any(p.name == name and p.kind in ("subject", "explainer", "stand-in") for p in PARTS):
        return str(hugging_face_folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UnknownNameError(f"the folder {path} holds no model (config.json is missing)")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UnknownNameError(f"there is no model folder {name!r}: check the path")
    return f"{_OWNERS[name]}/{name}" if name in _OWNERS else name
