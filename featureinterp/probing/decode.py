"""Linear decoders of labels: from all codes at once, and from the dense activations that the SAE was made
for.

The codes are standardised with the mean and deviation of the training tokens. For sparse codes that is never
done in memory: the deviation goes into the weights and the mean into the bias. The loss is the mean log loss
over training tokens plus λ/2 · ‖w‖² on the standardised scale (the bias is free); it is minimised by L-BFGS
(Liu and Nocedal 1989), all labels in one problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from featureinterp.errors import IncompatibleError, InputError
from featureinterp.probing.auroc import auroc_vec
from featureinterp.probing.columns import Columns, as_columns, as_labels, is_torch
from featureinterp.probing.splits import split_indices

EPSILON = 1e-6
LAMBDAS = (1.0, 0.2, 0.04, 0.008, 0.0016)
"""Tried from the strongest on, as long as it helps."""
MAX_STEPS = 200
TOLERANCE, ROUGH = 1e-4, 3e-3
"""Of the gradient: of what is kept, and while the penalty is chosen."""


@dataclass(frozen=True)
class LinearDecoder:
    """logits = x · ``weights`` + ``bias``, for x as it was given (not standardised). ``weights`` float64
    ``[input, output]``, ``bias`` ``[output]``; ``l2``: the λ that it was fitted with; ``steps``: evaluations
    of the loss."""

    weights: np.ndarray
    bias: np.ndarray
    l2: float
    steps: int

    def predict(self, x: Any, rows: np.ndarray | None = None) -> np.ndarray:
        """Logits, float64 ``[token, output]``, of all tokens or of ``rows``."""
        inputs = _rows_of(x, rows)
        return np.asarray(inputs.apply(self.weights) + inputs.offset @ self.weights + self.bias)


def standardize(x: Any, train: Any, epsilon: float = EPSILON) -> np.ndarray:
    """``x`` ``[token, input]`` less the mean of the training rows, over their deviation, which is taken to be
    ``epsilon`` at least: float64.
    """
    array = np.asarray(x.detach().cpu().numpy() if is_torch(x) else x, np.float64)
    rows = array[np.asarray(train)]
    if not len(rows):
        raise InputError("there are no training rows to standardise by")
    centred: np.ndarray = (array - rows.mean(0)) / np.maximum(rows.std(0), epsilon)
    return centred


def fit_logreg(
    x: Any,
    labels: Any,
    train: Any = None,
    *,
    l2: float | Sequence[float] = LAMBDAS,
    groups: Any = None,
    texts: Any = None,
    seed: int = 0,
) -> LinearDecoder:
    """A logistic regression per label, on the rows ``train`` (all when not given).

    ``x``: codes in any form of :func:`as_columns`, or a dense array or tensor ``[token, input]`` of any sign.
    ``labels`` bool ``[token, label]``. With several ``l2`` a fifth of the training rows (whole ``groups``,
    and none of the ``texts`` that the others have, as in :func:`split_indices`) is held out to choose by the
    log loss there, and the chosen one is fitted on all of them.
    """
    return _fitted(x, as_labels(labels, len_of(x)), train, _sigmoid_loss, l2, groups, texts, seed)


def fit_softmax(
    x: Any,
    classes: Any,
    train: Any = None,
    *,
    l2: float | Sequence[float] = LAMBDAS,
    groups: Any = None,
    texts: Any = None,
    seed: int = 0,
) -> LinearDecoder:
    """One multinomial regression over the classes 0 to K − 1 of ``classes`` ``[token]``; the rest as in
    :func:`fit_logreg`.
    """
    numbers = _classes(classes, len_of(x))
    wanted = np.eye(int(numbers.max()) + 1)[numbers]
    return _fitted(x, wanted, train, _softmax_loss, l2, groups, texts, seed)


def macro_auroc(scores: Any, classes: Any) -> tuple[float, int]:
    """(mean one-versus-rest AUROC over the classes that some token has and some token has not, how many those
    are); NaN and 0 when there is none. ``scores`` ``[token, class]``, ``classes`` int ``[token]``."""
    scores = scores.detach().cpu().numpy() if is_torch(scores) else np.asarray(scores)
    numbers = _classes(classes, len(scores))
    found = [auroc_vec(scores[:, k], numbers == k) for k in range(scores.shape[1])]
    known = [a for a in found if np.isfinite(a)]
    return (float(np.mean(known)) if known else float("nan")), len(known)


def decode_eval(
    codes: Any,
    dense: Any,
    classes: Any,
    *,
    split: tuple[np.ndarray, np.ndarray] | None = None,
    groups: Any = None,
    texts: Any = None,
    l2: float | Sequence[float] = LAMBDAS,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Softmax decoders of ``classes`` ``[token]`` from codes and from their dense twin (None: codes alone),
    side by side: per input ``accuracy``, ``macro_auroc``, ``n_classes`` (those that could be scored) and
    ``l2``, on test tokens."""
    train, test = split or split_indices(len_of(codes), seed=seed, groups=groups, texts=texts)
    numbers = _classes(classes, len_of(codes))
    found = {}
    for name, x in (("codes", codes), ("dense", dense)):
        if x is not None:
            decoder = fit_softmax(x, numbers, train, l2=l2, groups=groups, texts=texts, seed=seed)
            logits = decoder.predict(x, test)
            area, n = macro_auroc(logits, numbers[test])
            found[name] = {
                "accuracy": float((logits.argmax(1) == numbers[test]).mean()),
                "macro_auroc": area,
                "n_classes": n,
                "l2": decoder.l2,
            }
    return found


def len_of(x: Any) -> int:
    """Tokens of an input."""
    return int(x.shape[0])


_Loss = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(logits, wanted) → (loss of every token, its gradient by the logits)."""


def _fitted(
    x: Any,
    wanted: np.ndarray,
    train: Any,
    loss: _Loss,
    l2: float | Sequence[float],
    groups: Any,
    texts: Any,
    seed: int,
) -> LinearDecoder:
    rows = np.arange(len(wanted)) if train is None else np.asarray(train)
    path = sorted([float(l2)] if isinstance(l2, int | float) else [float(v) for v in l2], reverse=True)
    if not path or path[-1] < 0:
        raise InputError(f"l2 = {l2} is not possible: give numbers from 0")
    if not len(rows):
        raise InputError("there are no training rows to fit a decoder on")
    inputs, labels = _Standardised(_rows_of(x, rows)), wanted[rows]
    steps, w = 0, np.zeros((inputs.n_inputs + 1, wanted.shape[1]))
    if len(path) > 1:
        kept_together, same = (None if part is None else np.asarray(part)[rows] for part in (groups, texts))
        inner, held = split_indices(len(rows), 0.2, seed, kept_together, same)
        solutions: list[np.ndarray] = []
        values: list[float] = []
        for (
            strength
        ) in path:  # from the strongest, each from the solution of the one before, until it gets worse
            w, n = _minimum(inputs, labels, loss, strength, w, ROUGH, inner)
            steps += n
            solutions.append(w)
            values.append(float(loss(inputs.logits(w), labels)[0][held].sum()))
            if values[-1] > min(values):
                break
        best = int(np.argmin(values))
        path, w = [path[best]], solutions[best]
    w, n = _minimum(inputs, labels, loss, path[0], w, TOLERANCE)
    return LinearDecoder(*inputs.plain(w), path[0], steps + n)


def _minimum(
    inputs: _Standardised,
    wanted: np.ndarray,
    loss: _Loss,
    l2: float,
    start: np.ndarray,
    tolerance: float,
    counted: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Weights of standardised inputs with the bias as the last row, ``[input + 1, output]``, and the
    evaluations that it took; ``counted``: the tokens whose loss counts (all when not given)."""
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    n = len(wanted) if counted is None else len(counted)
    left_out = np.ones(len(wanted), bool)
    left_out[slice(None) if counted is None else counted] = False

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(start.shape)
        losses, slope = loss(inputs.logits(w), wanted)
        losses[left_out], slope[left_out] = 0, 0
        gradient = inputs.gradient(slope) / n
        gradient[:-1] += l2 * w[:-1]
        return float(losses.sum()) / n + l2 / 2 * float((w[:-1] ** 2).sum()), gradient.ravel()

    with threadpool_limits(
        1, user_api="blas"
    ):  # scipy's threads, waiting for their next small task, would take the processors from the matrices
        found = minimize(
            value,
            start.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_STEPS, "gtol": tolerance},
        )
    return found.x.reshape(start.shape), int(found.nfev)


def _sigmoid_loss(logits: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    small = np.exp(-np.abs(logits))  # one exponential for loss and slope
    positive = logits > 0
    loss = np.where(positive != wanted, np.abs(logits), 0) + np.log1p(small)
    slope = np.where(positive, 1, small) / (1 + small) - wanted
    return loss.sum(1, dtype=np.float64), slope


def _softmax_loss(logits: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.special import log_softmax

    log_p = log_softmax(logits, axis=1)
    return np.asarray(-(wanted * log_p).sum(1, dtype=np.float64)), np.asarray(np.exp(log_p) - wanted)


class _Inputs(Protocol):
    """Some tokens' inputs x, of which ``apply(weights)`` is (x − offset) · weights in float32, and
    ``pull(slope)`` is (x − offset)ᵀ · slope in float64. ``mean`` and ``deviation`` ``[input]`` are those of x
    − offset."""

    mean: np.ndarray
    deviation: np.ndarray
    offset: np.ndarray

    def apply(self, weights: np.ndarray) -> np.ndarray: ...

    def pull(self, slope: np.ndarray) -> np.ndarray: ...


class _Sparse:
    """Codes, by scipy on the CPU."""

    def __init__(self, columns: Columns) -> None:
        import scipy.sparse

        values = np.asarray(columns.values, np.float32)
        self.matrix = scipy.sparse.csc_matrix(
            (values, columns.rows, columns.offsets), shape=columns.shape
        ).tocsr()
        self.mean, self.deviation = _moments(columns)
        self.offset = np.zeros(columns.n_features)

    def apply(self, weights: np.ndarray) -> np.ndarray:
        return np.asarray(self.matrix @ weights.astype(np.float32))

    def pull(self, slope: np.ndarray) -> np.ndarray:
        return np.asarray(self.matrix.T @ slope.astype(np.float32), np.float64)


class _OnDevice:
    """Codes or dense inputs as a matrix of :mod:`featureinterp.probing.tensors`."""

    def __init__(self, matrix: Any, mean: np.ndarray, deviation: np.ndarray, offset: np.ndarray) -> None:
        self.apply, self.pull = matrix.apply, matrix.pull
        self.mean, self.deviation, self.offset = mean, deviation, offset


def _moments(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every feature's codes, zeros included: float64 ``[feature]``."""
    n = max(1, columns.n_rows)
    sums, squares = np.zeros(columns.n_features), np.zeros(columns.n_features)
    for start, end in columns.parts():
        span = slice(columns.offsets[start], columns.offsets[end])
        values, feature = (
            np.asarray(columns.values[span], np.float64),
            np.repeat(np.arange(end - start), columns.counts[start:end]),
        )
        sums[start:end] = np.bincount(feature, values, end - start)
        squares[start:end] = np.bincount(feature, values**2, end - start)
    return sums / n, np.sqrt(np.maximum(squares / n - (sums / n) ** 2, 0))


def _rows_of(x: Any, rows: np.ndarray | None) -> _Inputs:
    """The inputs of some tokens (None: all)."""
    sparse = (
        isinstance(x, Columns) or hasattr(x, "tocsc") or (is_torch(x) and str(x.layout) != "torch.strided")
    )
    if not sparse and x.ndim != 2:
        raise InputError(f"inputs of shape {tuple(x.shape)} are not a matrix: give [token, input]")
    from featureinterp.probing.tensors import DenseMatrix, SparseMatrix

    if not sparse:
        dense = DenseMatrix(x, rows)
        if not (np.isfinite(dense.mean).all() and np.isfinite(dense.deviation).all()):
            raise InputError("the inputs of a decoder must be finite")
        return _OnDevice(dense, dense.mean, dense.deviation, dense.offset)
    columns = as_columns(x) if rows is None else as_columns(x).take(rows)
    if is_torch(x) and x.is_cuda:
        matrix = SparseMatrix(columns.shape, columns.offsets, columns.rows, columns.values, x.device)
        return _OnDevice(matrix, *_moments(columns), np.zeros(columns.n_features))
    return _Sparse(columns)


class _Standardised:
    """Inputs seen standardised. ``w``: weights with the bias as the last row, ``[input + 1, output]``."""

    def __init__(self, inputs: _Inputs) -> None:
        self.inputs = inputs
        self.mean, self.deviation = inputs.mean[:, None], np.maximum(inputs.deviation, EPSILON)[:, None]
        self.n_inputs = len(inputs.mean)

    def logits(self, w: np.ndarray) -> np.ndarray:
        weights = w[:-1] / self.deviation
        return np.asarray(
            self.inputs.apply(weights) + (w[-1] - (self.mean * weights).sum(0)).astype(np.float32)
        )

    def gradient(self, slope: np.ndarray) -> np.ndarray:
        total = slope.sum(0, keepdims=True, dtype=np.float64)
        return np.concatenate([(self.inputs.pull(slope) - self.mean * total) / self.deviation, total])

    def plain(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights and bias for the inputs as they are."""
        weights = w[:-1] / self.deviation
        return weights, w[-1] - ((self.mean + self.inputs.offset[:, None]) * weights).sum(0)


def _classes(classes: Any, n: int) -> np.ndarray:
    array = classes.detach().cpu().numpy() if is_torch(classes) else np.asarray(classes)
    if array.shape != (n,):
        raise IncompatibleError(
            f"there are classes of shape {array.shape} for {n} tokens: give one per token"
        )
    if not np.issubdtype(array.dtype, np.integer) or (len(array) and array.min() < 0):
        raise InputError("classes must be whole numbers from 0")
    return np.asarray(array)
