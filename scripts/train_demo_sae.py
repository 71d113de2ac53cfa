"""Trains the demo SAE that is shipped under data/demo-sae: TopK on the embedded subject's residual stream.

    python scripts/train_demo_sae.py --out data/demo-sae

Every tenth document is held out: neither trained on nor used for any choice. The figures that are written into config.json are
measured on those documents with the very file that is shipped (float16 weights read back from disk).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from featureinterp.corpus.text import load_corpus
from featureinterp.corpus.windows import WindowPolicy, WindowTable, build_windows
from featureinterp.sae.codes import SparseCodes
from featureinterp.sae.load import load_sae, save_sae
from featureinterp.sae.topk import TopK
from featureinterp.subject.load import Subject, load_subject

HOLD_OUT_EVERY = 10
SINK_FACTOR = 10
"""Tokens whose norm exceeds this many medians are attention sinks: neither trained on nor counted in the main figure."""


@dataclass(frozen=True)
class Settings:
    """What the run is made of; written into the SAE's provenance."""

    model: str = "smollm2-135m-instruct"
    corpus: str = "sotu"
    hook: str = "blocks.14.hook_resid_post"
    window: int = 64
    max_tokens: int = 1_500_000
    d_sae: int = 4608
    k: int = 32
    samples: int = 3_600_000
    batch: int = 2048
    lr: float = 1e-3
    warmup: int = 100
    aux_k: int = 256
    aux_coefficient: float = 1 / 32
    dead_after: int = 150_000
    seed: int = 0


def extract(subject: Subject, table: WindowTable, rows: np.ndarray, hook: str, path: Path, batch: int = 32) -> np.ndarray:
    """Activations of all tokens of ``rows``, float16 ``[token, d_model]``, memory-mapped at ``path``."""
    n = int(table.lengths[rows].sum())
    out = np.lib.format.open_memmap(path, "w+", np.float16, (n, subject.d_model))
    done, start = 0, time.monotonic()
    order = rows[np.argsort(table.lengths[rows], kind="stable")]
    for group in np.split(order, np.flatnonzero(np.diff(table.lengths[order])) + 1):
        for chunk in np.split(group, range(batch, len(group), batch)):
            length = int(table.lengths[chunk[0]])
            ids = torch.from_numpy(np.array(table.tokens[chunk, :length], np.int64))
            x = subject.residual(ids, hook).reshape(-1, subject.d_model).float()
            out[done : done + len(x)] = x.half().cpu().numpy()
            done += len(x)
            if (done // 2048) % 50 == 0:
                print(f"\rextracted {done:,} of {n:,} tokens, {done / (time.monotonic() - start):,.0f}/s", end="", flush=True)
    print()
    return out


class Trainer:
    """TopK with tied initialisation, unit-norm decoder rows, an auxiliary loss for dead latents, warm-up and cosine decay."""

    def __init__(self, x: np.ndarray, s: Settings) -> None:
        torch.manual_seed(s.seed)
        self.x, self.s = x, s
        self.rng = np.random.default_rng(s.seed)
        self.rows = np.flatnonzero(~sinks(x))
        picked = np.sort(self.rng.choice(self.rows, min(len(self.rows), 50_000), replace=False))
        sample = torch.from_numpy(x[picked].astype(np.float32))
        self.b_dec = sample.mean(0)
        self.variance = float((sample - self.b_dec).pow(2).sum(1).mean())
        self.scale = math.sqrt(x.shape[1]) / float((sample - self.b_dec).norm(dim=1).median())
        self.b_dec, self.variance = self.b_dec * self.scale, self.variance * self.scale**2
        directions = torch.nn.functional.normalize(torch.randn(s.d_sae, x.shape[1]), dim=1)
        self.params = {
            "W_dec": directions.clone(),
            "W_enc": directions.T.contiguous().clone(),
            "b_enc": torch.zeros(s.d_sae),
            "b_dec": self.b_dec.clone(),
        }
        for p in self.params.values():
            p.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.params.values(), lr=s.lr, betas=(0.9, 0.999))
        self.silent_for = torch.zeros(s.d_sae, dtype=torch.long)
        self.steps = s.samples // s.batch

    def run(self) -> None:
        """All steps; prints the fraction of variance unexplained now and then."""
        order, at, start = self.rng.permutation(self.rows), 0, time.monotonic()
        for step in range(self.steps):
            if at + self.s.batch > len(order):
                order, at = self.rng.permutation(self.rows), 0
            rows = np.sort(order[at : at + self.s.batch])
            at += self.s.batch
            fvu = self.step(torch.from_numpy(self.x[rows].astype(np.float32)) * self.scale, step)
            if step % 50 == 0:
                dead = float((self.silent_for > self.s.dead_after).float().mean())
                rate = (step + 1) * self.s.batch / (time.monotonic() - start)
                print(f"step {step}/{self.steps} fvu {fvu:.4f} dead {dead:.3f} {rate:,.0f} samples/s", flush=True)

    def step(self, x: torch.Tensor, step: int) -> float:
        """One optimiser step on ``x [batch, d_in]``; returns the batch's fraction of variance unexplained."""
        s, p = self.s, self.params
        progress = max(0.0, (step - s.warmup) / max(1, self.steps - s.warmup))
        rate = s.lr * min(1.0, (step + 1) / s.warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        values, indices = torch.topk(pre, s.k, dim=1, sorted=False)
        error = x - (self._decode(indices, torch.relu(values)) + p["b_dec"])
        fvu = error.pow(2).sum(1).mean() / self.variance
        loss = fvu
        dead = torch.nonzero(self.silent_for > s.dead_after).squeeze(1)
        if len(dead):
            v, i = torch.topk(pre[:, dead], min(s.aux_k, len(dead)), dim=1, sorted=False)
            guess = self._decode(dead[i], torch.relu(v))
            loss = loss + s.aux_coefficient * (error.detach() - guess).pow(2).sum() / error.detach().pow(2).sum()
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            w, g = p["W_dec"], p["W_dec"].grad
            g -= (g * w).sum(1, keepdim=True) * w
            torch.nn.utils.clip_grad_norm_(list(p.values()), 1.0)
            self.optimizer.step()
            w /= w.norm(dim=1, keepdim=True)
            self.silent_for += len(x)
            self.silent_for[torch.unique(indices[values > 0])] = 0
        return float(fvu.detach())

    def _decode(self, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding_bag(indices, self.params["W_dec"], mode="sum", per_sample_weights=values)

    def export(self) -> TopK:
        """The SAE in raw units: the scale is folded into the biases, so that codes are in units of the residual stream."""
        p = {k: v.detach() for k, v in self.params.items()}
        tensors = {"W_enc": p["W_enc"], "W_dec": p["W_dec"], "b_enc": p["b_enc"] / self.scale, "b_dec": p["b_dec"] / self.scale}
        return TopK(tensors, k=self.s.k)


def sinks(x: np.ndarray, chunk: int = 65_536) -> np.ndarray:
    """Which rows of ``x`` are attention sinks, bool ``[token]``."""
    norms = np.concatenate([np.linalg.norm(x[i : i + chunk].astype(np.float32), axis=1) for i in range(0, len(x), chunk)])
    return norms > SINK_FACTOR * np.median(norms)


def evaluate(sae: TopK, x: np.ndarray) -> dict[str, float]:
    """Explained variance 1 − Σ‖x − x̂‖² / Σ‖x − mean‖², mean L0, and the share of features that never fire, without sinks;
    ``explained_variance_with_sinks`` counts them (their few rows then carry most of the variance)."""
    sink = sinks(x)
    main = _explained(sae, x[~sink])
    return {**main, "explained_variance_with_sinks": _explained(sae, x[:])["explained_variance"], "n_sinks": int(sink.sum())}


def _explained(sae: TopK, x: np.ndarray, chunk: int = 4096) -> dict[str, float]:
    mean = x.mean(0, dtype=np.float64)
    residual = total = 0.0
    nonzeros = 0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    for start in range(0, len(x), chunk):
        part = torch.from_numpy(x[start : start + chunk].astype(np.float32))
        codes: SparseCodes = sae.encode(part)
        residual += float((part - sae.decode(codes)).double().pow(2).sum())
        total += float((part.double() - torch.from_numpy(mean)).pow(2).sum())
        nonzeros += len(codes.values)
        fired[codes.features] = True
    return {
        "explained_variance": round(1 - residual / total, 4),
        "l0": round(nonzeros / len(x), 2),
        "dead_share": round(float((~fired).float().mean()), 4),
        "n_tokens": len(x),
    }


def train(s: Settings, out: Path, *, device: str = "cpu", work: Path | None = None) -> dict[str, float]:
    """Trains an SAE and writes it to ``out``; returns its figures on the held-out documents. ``work``: keeps the extracted activations there, and
    reuses those that it finds."""
    with tempfile.TemporaryDirectory() as temporary:
        work = work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        subject = load_subject(s.model, device=device)
        table = build_windows(load_corpus(s.corpus), subject.encoder, WindowPolicy(s.window, max_tokens=s.max_tokens), work / "windows")
        held_out = np.asarray(table.documents) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        arrays = {}
        for split, rows in (("train", np.flatnonzero(~held_out)), ("test", np.flatnonzero(held_out))):
            path = work / f"{split}.npy"
            arrays[split] = np.load(path, "r") if path.exists() else extract(subject, table, rows, s.hook, path)
        trainer = Trainer(arrays["train"], s)
        trainer.run()
        provenance = {
            "script": "scripts/train_demo_sae.py",
            "settings": {k: getattr(s, k) for k in Settings.__dataclass_fields__},
            "model_fingerprint": subject.fingerprint,
            "windows_fingerprint": table.fingerprint,
            "held_out": f"every {HOLD_OUT_EVERY}th document of the corpus ({len(np.unique(table.documents[held_out]))} documents)",
        }
        save_sae(out, trainer.export(), hook=s.hook, model=s.model, dtype=torch.float16)
        written = load_sae(str(out))
        metrics = evaluate(written.sae, arrays["test"])  # type: ignore[arg-type]
        save_sae(out, written.sae, hook=s.hook, model=s.model, dtype=torch.float16, metrics=metrics, provenance=provenance)
        return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for field in ("hook", "max_tokens", "samples", "d_sae", "seed"):
        default = getattr(Settings, field)
        parser.add_argument("--" + field.replace("_", "-"), type=type(default), default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=None, help="keep the extracted activations here and reuse them")
    args = vars(parser.parse_args())
    out, device, work = (args.pop(name) for name in ("out", "device", "work"))
    print(json.dumps(train(Settings(**args), out, device=device, work=work)))


if __name__ == "__main__":
    main()
