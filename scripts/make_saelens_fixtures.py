"""Small SAEs as SAELens saves them, with what SAELens itself makes of some inputs: the oracle of
``tests/test_checkpoints.py``.

    python -m venv ENV && ENV/bin/pip install sae-lens==6.54
    ENV/bin/python scripts/make_saelens_fixtures.py tests/data/saelens
    ENV/bin/python scripts/make_saelens_fixtures.py --exported tests/data/saelens-exported

Needs the package sae-lens, in an environment of its own. Writes one folder per form: ``cfg.json``,
``sae_weights.safetensors``, and ``expected.json`` with inputs, codes and reconstructions. ``--exported``: the
folders are there already, as this project exports them; SAELens loads them and ``expected.json`` alone is
written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sae_lens import SAE

D_IN, D_SAE = 6, 10
FORMS = {
    "standard": {"architecture": "standard", "apply_b_dec_to_input": True},
    "standard-uncentred": {"architecture": "standard", "apply_b_dec_to_input": False},
    "topk": {
        "architecture": "topk",
        "k": 3,
        "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": False,
    },
    "topk-rescaled": {
        "architecture": "topk",
        "k": 3,
        "apply_b_dec_to_input": False,
        "rescale_acts_by_decoder_norm": True,
    },
    "jumprelu": {"architecture": "jumprelu", "apply_b_dec_to_input": False},
    "jumprelu-centred": {"architecture": "jumprelu", "apply_b_dec_to_input": True},
    "gated": {"architecture": "gated", "apply_b_dec_to_input": True},
    "gated-uncentred": {"architecture": "gated", "apply_b_dec_to_input": False},
    "topk-normalised": {
        "architecture": "topk",
        "k": 3,
        "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": False,
        "normalize_activations": "layer_norm",
    },
    "jumprelu-normalised": {
        "architecture": "jumprelu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm",
    },
}


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, form in FORMS.items():
        where = {"metadata": {"model_name": "pythia-160m-deduped", "hook_name": "blocks.8.hook_resid_post"}}
        sae = SAE.from_dict(
            {
                "d_in": D_IN,
                "d_sae": D_SAE,
                "dtype": "float32",
                "device": "cpu",
                "normalize_activations": "none",
                **form,
                **where,
            }
        )
        with torch.no_grad():
            for key, parameter in sae.named_parameters():
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(
                    values.abs() * 0.3
                    if key == "threshold"
                    else values * (0.5 if parameter.ndim == 1 else 1.0)
                )
        x = torch.randn(12, D_IN, generator=generator)
        sae.save_model(out / name)
        expect(sae, x, out / name, bool(form.get("rescale_acts_by_decoder_norm")))


def exported(out: Path) -> None:
    for folder in sorted(out.iterdir()):
        expect(
            SAE.load_from_disk(folder),
            2 * torch.randn(12, D_IN, generator=torch.Generator().manual_seed(1)),
            folder,
            False,
        )


def expect(sae: SAE, x: torch.Tensor, folder: Path, scaled: bool) -> None:
    """What SAELens makes of some inputs."""
    with torch.no_grad():
        codes = sae.encode(x)
        decoded = sae.decode(codes)
    found = {"x": x.tolist(), "codes": codes.tolist(), "decoded": decoded.tolist(), "scaled": scaled}
    (folder / "expected.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    exported(Path(sys.argv[2])) if sys.argv[1] == "--exported" else main(Path(sys.argv[1]))
