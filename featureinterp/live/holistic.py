"""Holistic activations: how much a feature's mean activation over a window falls when a token is left out of
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Integer
from torch import Tensor

from featureinterp.codes.collect import check_sae, check_subject, scored_by_norm
from featureinterp.codes.fit import check_fit
from featureinterp.codes.store import CodesStore
from featureinterp.domain.choices import HolisticMethod as Method
from featureinterp.domain.record import SPLITS, FeatureRecord, Window
from featureinterp.errors import InputError
from featureinterp.machine.accelerator import fit_of, in_parts
from featureinterp.sae.load import LoadedSae
from featureinterp.subject.attribution import Deletions, embedding_effects
from featureinterp.subject.load import Subject

METHODS: tuple[Method, ...] = ("exact", "gradient")
ENCODED_ROWS = 8192


class HolisticActivations:
    """Which tokens cause a feature's activations, for windows of token ids.

    ``exact``: every token is left out in turn, and the model reads the rest. ``gradient``: the gradient of
    the mean activation with respect to every token's embedding, times the embedding; one pass forward and one
    back for a window, and first order only. The mean is over all tokens of the text, those that are not
    scored counting as 0. A window is read as it is, without what stands before it.
    """

    def __init__(self, subject: Subject, sae: LoadedSae, method: Method = "exact") -> None:
        if method not in METHODS:
            raise InputError(
                f"there is no method {method!r} of holistic activations: choose from {', '.join(METHODS)}"
            )
        check_fit(subject, sae)
        self.subject, self.sae, self.method = subject, sae, method
        self._deletions = Deletions(subject, sae.hook) if method == "exact" else None

    @classmethod
    def of_run(
        cls, store: CodesStore, subject: Subject, sae: LoadedSae, method: Method = "exact"
    ) -> HolisticActivations:
        """For records of ``store``. Raises ``IncompatibleError`` when model or SAE are not those that made
        it.
        """
        check_sae(store, sae)
        check_subject(store, subject)
        return cls(subject, sae, method)

    def of(
        self, feature: int, windows: Sequence[Integer[np.ndarray, " _token"]]
    ) -> list[Float32[np.ndarray, " _token"]]:
        """Holistic activations of the tokens of windows, given by their ids, in raw SAE units: positive where
        the feature's mean activation is larger with the token than without.
        """
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(windows)
        for length in sorted({len(w) for w in windows} - {0}):
            places = [i for i, w in enumerate(windows) if len(w) == length]
            ids = torch.from_numpy(np.stack([np.asarray(windows[i], np.int64) for i in places]))
            values = self._exact(feature, ids) if self.method == "exact" else self._gradient(feature, ids)
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return found

    def add(self, records: Iterable[FeatureRecord]) -> Iterator[FeatureRecord]:
        """The records, with holistic activations in the firing windows of their training split; no others are
        looked at by an explainer.
        """
        for record in records:
            train = record.splits.get("train", {})
            windows = [w for found in train.values() for w in found if w.fires]
            causes = dict(
                zip(
                    map(id, windows),
                    self.of(record.feature.index, [w.token_ids for w in windows]),
                    strict=True,
                )
            )

            def with_causes(window: Window, causes: dict[int, np.ndarray] = causes) -> Window:
                return replace(window, holistic=causes[id(window)]) if id(window) in causes else window

            train = {source: tuple(map(with_causes, found)) for source, found in train.items()}
            yield replace(
                record,
                splits={s: train if s == "train" else record.splits.get(s, {}) for s in SPLITS},
                holistic=self.method,
            )

    @torch.inference_mode()
    def _exact(self, feature: int, ids: Int64[Tensor, "window n"]) -> Float32[np.ndarray, "window n"]:
        assert self._deletions is not None
        out = []
        n = ids.shape[1]
        for window in ids:
            residual, rows = self._deletions.residuals(window[None])
            residual = residual[0]
            activations = self._encoded(feature, residual)
            norms = residual.float().norm(dim=-1)
            own = torch.where(scored_by_norm(norms[None, :n], self.subject)[0], activations[:n], 0).sum() / n
            if n > 1:
                rest = torch.where(scored_by_norm(norms[rows], self.subject), activations[rows], 0).sum(1) / (
                    n - 1
                )
                out.append((own - rest).cpu().numpy())
            else:
                out.append(own[None].cpu().numpy())
        return np.stack(out)

    def _gradient(self, feature: int, ids: Int64[Tensor, "window n"]) -> Float32[np.ndarray, "window n"]:
        def mean(residual: Float[Tensor, "window n d_model"]) -> Float[Tensor, " window"]:
            scored = scored_by_norm(residual.detach().float().norm(dim=-1), self.subject)
            flat = self._activations(feature, residual.reshape(-1, residual.shape[-1]))
            return (flat.reshape(scored.shape) * scored).sum(1) / scored.shape[1]

        def effects(part: slice) -> np.ndarray:
            return embedding_effects(self.subject, self.sae.hook, ids[part], mean).numpy()

        fit = fit_of(self.subject.model, "gradients of windows")
        parts = in_parts(len(ids), ids.shape[1], ENCODED_ROWS, fit, self.subject.device, effects)
        return np.concatenate([found for _, found in parts])

    def _encoded(self, feature: int, residual: Float[Tensor, "row d_model"]) -> Float32[Tensor, " row"]:
        """:meth:`_activations`, as many rows at once as fit."""
        fit, device = fit_of(self.sae.sae, "encoding"), self.sae.sae.device
        parts = in_parts(
            len(residual),
            1,
            ENCODED_ROWS,
            fit,
            device,
            lambda part: self._activations(feature, residual[part]),
        )
        return torch.cat([found for _, found in parts])

    def _activations(self, feature: int, residual: Float[Tensor, "row d_model"]) -> Float32[Tensor, " row"]:
        """The feature's codes of ``residual``."""
        codes = self.sae.sae.encode(residual)
        mine = codes.features == feature
        return torch.zeros(len(residual), dtype=torch.float32, device=codes.values.device).index_put(
            (codes.rows[mine],), codes.values[mine].float()
        )
