"""GGUF files → ordinary Hugging Face folders, once, in the cache.

transformers reads GGUF, slowly, and cannot save what it read. So the weights are unpacked once to bfloat16
safetensors, which load in a moment. The tokenizer's control tokens, which the conversion forgets for some
families, are declared from the GGUF's own table.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from featureinterp.assets.fetch import fetch, prepared_folder
from featureinterp.errors import DownloadError
from featureinterp.files import explained_storage

_RECIPE = "bf16-1"
_CONTROL = 3


def hugging_face_folder(name: str, progress: Any = None) -> Path:
    """A folder that ``from_pretrained`` reads: the embedded part ``name``, fetched and unpacked when it is
    not yet.
    """
    fetched = fetch(name, progress)
    if fetched.file.suffix != ".gguf":
        return fetched.folder
    folder = prepared_folder(name, _RECIPE)
    if not (folder / "config.json").exists():
        _unpack(fetched.file, folder)
    return folder


def _unpack(file: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from featureinterp.quiet import quiet_transformers

    with explained_storage(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with quiet_transformers(), explained_storage(folder):
            packed = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.bfloat16,
                quantization_config=transformers.GgufConfig(dequantize=True),
            )
            settings = packed.config.to_dict()
            settings.pop("quantization_config", None)
            config = type(packed.config).from_dict(settings)
            with torch.device("meta"):
                plain = type(packed)._from_config(config, dtype=torch.bfloat16)
            plain.load_state_dict(packed.state_dict(), assign=True)
            plain.tie_weights()
            plain.generation_config = packed.generation_config
            plain.save_pretrained(work)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            tokenizer.add_special_tokens({"additional_special_tokens": _control_tokens(file)})
            if len(tokenizer) > config.vocab_size:
                raise DownloadError(
                    f"{file.name} declares control tokens that its vocabulary lacks: fetch it again"
                )
            tokenizer.save_pretrained(work)
        try:
            os.replace(work, folder)
        except OSError:
            if not (folder / "config.json").exists():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _control_tokens(file: Path) -> list[str]:
    import gguf

    fields = gguf.GGUFReader(file).fields
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"].contents()
    return [
        str(bytes(tokens.parts[index]), "utf-8")
        for index, kind in zip(tokens.data, types, strict=True)
        if kind == _CONTROL
    ]
