"""Probing: what labelled concepts say about every feature at once.

Pure functions of sparse codes ``[token, feature]`` and labels ``[token, concept]``. Codes may be numpy
arrays, scipy sparse matrices, torch tensors (dense or sparse, on any device), or :class:`Columns`; results
are numpy arrays.
"""

from featureinterp.probing.annotate import Annotation, annotate_features, runs_of
from featureinterp.probing.auroc import BestSingle, auroc_all, auroc_vec, best_single_train_test
from featureinterp.probing.buffer import ActivationBuffer
from featureinterp.probing.columns import Columns, as_columns
from featureinterp.probing.decode import (
    LinearDecoder,
    decode_eval,
    fit_logreg,
    fit_softmax,
    macro_auroc,
    standardize,
)
from featureinterp.probing.domain_f1 import DomainF1, domain_f1
from featureinterp.probing.labels import Labels, Span, load_labels
from featureinterp.probing.nulls import auroc_interval, auroc_null, f1_interval, f1_null, p_values, shift_rows
from featureinterp.probing.splits import split_indices
from featureinterp.probing.tokens import Labelled, RunTokens

__all__ = [
    "ActivationBuffer",
    "Annotation",
    "BestSingle",
    "Columns",
    "DomainF1",
    "Labelled",
    "Labels",
    "LinearDecoder",
    "RunTokens",
    "Span",
    "annotate_features",
    "as_columns",
    "auroc_all",
    "auroc_interval",
    "auroc_null",
    "auroc_vec",
    "best_single_train_test",
    "decode_eval",
    "domain_f1",
    "f1_interval",
    "f1_null",
    "fit_logreg",
    "fit_softmax",
    "load_labels",
    "macro_auroc",
    "p_values",
    "runs_of",
    "shift_rows",
    "split_indices",
    "standardize",
]
