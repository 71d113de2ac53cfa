"""Holistic activations against a loop that runs every deletion in full.

    python scripts/bench/holistic.py [--quick] [--device cpu|cuda]

Windows of 32 tokens (64 without --quick, too) through a subject and an SAE of the embedded ones' shapes,
random weights. The limit is the loop: for every token, the window without it through the model up to the hook
and the SAE. Ours must be at least 3 times as fast; ``ratio`` is the loop's seconds over ours. The gradient's
seconds are reported beside them.
"""

from __future__ import annotations

import torch
from common import arguments, compare, report
from shapes import shapes

from featureinterp.live.holistic import HolisticActivations

FEATURE = 7


def main() -> None:
    args = arguments(__doc__ or "")
    subject, loaded = shapes(args.device)
    exact, gradient = HolisticActivations(subject, loaded), HolisticActivations(subject, loaded, "gradient")
    n_windows = 1 if args.quick else 4 if args.device == "cpu" else 32
    for length in (32,) if args.quick else (32, 64):
        ids = torch.randint(2, 49_152, (n_windows, length), generator=torch.Generator().manual_seed(0))
        windows = list(ids.numpy())

        @torch.inference_mode()
        def loop(ids: torch.Tensor = ids) -> None:
            for window in ids:
                for t in range(len(window)):
                    residual = subject.residual(torch.cat([window[:t], window[t + 1 :]])[None], loaded.hook)
                    codes = loaded.sae.encode(residual[0])
                    float(codes.values[codes.features == FEATURE].sum())

        rounds = args.rounds or (2 if args.quick else 5)
        for name, method in (("exact", exact), ("gradient", gradient)):
            ours, limit = compare(
                lambda method=method, windows=windows: method.of(FEATURE, windows), loop, args.device, rounds
            )  # type: ignore[misc]
            report(
                f"holistic activations, {name}, {length} tokens",
                1000 * ours / n_windows,
                1000 * limit / n_windows,
                limit / ours,
                unit="ms/window",
                target=">= 3" if name == "exact" else "",
                device=args.device,
            )


if __name__ == "__main__":
    main()
