"""The one training loop: steps, schedule, dead features, checkpoints, and a log of what happened."""

from __future__ import annotations

import gc
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from featureinterp.errors import DamagedStoreError, FeatureInterpError, IncompatibleError, InputError
from featureinterp.files import (
    content_key,
    explained_storage,
    opened_file,
    parse_json,
    replaced_atomically,
    whole_file,
)
from featureinterp.stored.sums import is_sealed
from featureinterp.training.architectures import TRAINABLE, Normalizer, Trainable
from featureinterp.training.batches import Batches, as_tensor
from featureinterp.training.functions import geometric_median
from featureinterp.training.ranks import Ranks
from featureinterp.training.settings import SaeTable, TrainingTable

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
_FROM_THE_START = "delete it to train from the start (log.jsonl and the activations stay)"
Line = dict[str, Any]
OnLine = Callable[[Line], None]
"""Called with every line of the log."""


def planned_steps(table: TrainingTable, n_rows: int | None) -> int:
    """How many steps a run has; ``n_rows``: of the store, None where that is not known. Raises
    ``InputError``.
    """
    samples = table.samples
    if samples is None:
        if n_rows is None:
            raise InputError(
                "without a store the number of tokens to train on must be said: set training.samples"
            )
        samples = round(table.epochs * n_rows)
    if samples < table.batch:
        raise InputError(
            f"a batch of {table.batch:,} rows is larger than the {samples:,} samples of the run: choose a "
            "smaller batch or more samples"
        )
    return samples // table.batch


def learning_rate(table: TrainingTable, step: int, steps: int) -> float:
    """The rate of a step, counted from 0: a linear rise over ``warmup`` steps to ``lr``, then a fall to
    ``lr_end``, which the last step has.
    """
    warmup = min(table.warmup, max(0, steps - 1))
    if step < warmup:
        return table.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    match table.decay:
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            share = 1 - progress
        case "constant":
            share = 1.0
    return table.lr_end + (table.lr - table.lr_end) * share


@dataclass
class Trainer:
    """A model with all that changes while it learns. ``silent_for``: tokens since each feature fired, int64
    ``[d_sae]``.
    """

    model: Trainable
    normalizer: Normalizer
    table: TrainingTable
    batches: Batches
    steps: int
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        self.model.half_precision = self.table.precision == "bfloat16"
        self.model.to(self.device).train()
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=self.table.lr, betas=self.table.betas, fused=fused
        )
        self.silent_for = torch.zeros(self.model.d_sae, dtype=torch.int64, device=self.device)
        self.step = 0
        self._module: nn.Module = self.model
        if self.ranks.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self._module = nn.parallel.DistributedDataParallel(
                self.model, device_ids=ids, gradient_as_bucket_view=True
            )

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Which features are dead."""
        return self.silent_for > self.model.table.dead_after

    def one_step(self) -> Line:
        """Takes a step; what it gave, over all processes."""
        table, ranks = self.table, self.ranks
        rate = learning_rate(table, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x = self.normalizer(as_tensor(self.batches.next(), self.device))
        growth = self.model.table.penalty_warmup * self.steps
        strength = 1.0 if growth < 1 else min(1.0, (self.step + 1) / growth)
        found = self._module(x, torch.nonzero(self.dead).squeeze(1), strength)
        self.optimizer.zero_grad()
        found.loss.backward()
        self.model.free_rows()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), table.clip or float("inf"))
        self.optimizer.step()
        self.model.constrain()
        self.silent_for += table.batch
        self.silent_for[ranks.any(found.fired)] = 0
        self.step += 1
        sums = ranks.sum(
            torch.stack(
                [
                    found.error.double(),
                    found.n_codes.double(),
                    found.loss.detach().double(),
                    found.penalty.double(),
                    found.aux.double(),
                ]
            )
        )
        error, n_codes, loss, penalty, aux = sums.tolist()
        if not math.isfinite(loss):
            raise FeatureInterpError(
                f"training diverged: the loss of step {self.step} is not finite; lower training.lr, or "
                "raise training.warmup"
            )
        n = ranks.world
        return {
            "loss": loss / n,
            "fvu": error / (table.batch * self.model.variance),
            "penalty": penalty / n,
            "aux": aux / n,
            "l0": n_codes / table.batch,
            "grad_norm": float(norm),
            "lr": rate,
        }

    def part(self) -> None:
        """Lets go of what the processes share; no step can follow. torch may abort a process that leaves
        while gradients are still tied to its group.
        """
        if self.ranks.world > 1:
            del self._module
            gc.collect()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that changes, as tensors."""
        found = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state[p].items():
                found[f"adam.{name}.{key}"] = value
        return {**found, "silent_for": self.silent_for}

    def restore(self, tensors: dict[str, torch.Tensor], step: int, cursor: dict[str, int]) -> None:
        """Goes on from a checkpoint."""
        self.model.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
        optimizer = self.optimizer.state_dict()
        for number, (name, _) in enumerate(self.model.named_parameters()):
            prefix = f"adam.{name}."
            optimizer["state"][number] = {
                k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
            }
        self.optimizer.load_state_dict(optimizer)
        if tensors["silent_for"].shape != self.silent_for.shape:
            raise ValueError(f"silent_for has the shape {list(tensors['silent_for'].shape)}")
        self.silent_for = tensors["silent_for"].to(self.silent_for)
        self.step = step
        self.batches.seek(cursor)


def prepare(
    batches: Batches,
    sae: SaeTable,
    table: TrainingTable,
    device: torch.device,
    n_rows: int | None,
    ranks: Ranks = Ranks(),
) -> Trainer:
    """A trainer at its first step: normalisation, variance and the pre-bias, the geometric median, come from
    a sample of several shards.
    """
    steps = planned_steps(table, n_rows)
    sample = as_tensor(
        batches.sample(table.presample_rows, seed=table.seed, n_shards=table.presample), device
    )
    normalizer = Normalizer.of(sae.normalize, sample)
    sample = normalizer(sample)
    variance = float((sample - sample.mean(0)).pow(2).sum(1).mean())
    if not variance > 0:
        raise IncompatibleError("all activations are equal: there is nothing to learn from them")
    generator = torch.Generator().manual_seed(table.seed)
    bias = geometric_median(sample).cpu()
    model = TRAINABLE[sae.architecture](
        batches.d_model, sae, bias=bias, variance=variance, generator=generator, ranks=ranks
    )
    return Trainer(model, normalizer, table, batches, steps, device, ranks)


def resume(trainer: Trainer, folder: Path, key: dict[str, Any]) -> None:
    """Takes a trainer to where the run in ``folder`` stands, when there is one. Raises ``IncompatibleError``
    for one of another ``key``.
    """
    read_checkpoint(trainer, folder / CHECKPOINT, content_key(key))


def run(trainer: Trainer, folder: Path, key: dict[str, Any], *, on_line: OnLine = lambda _: None) -> None:
    """Takes all steps that are left, with a log and checkpoints in ``folder``. ``key``: what the run depends
    on, for :func:`resume`.
    """
    table, ranks = trainer.table, trainer.ranks
    same = content_key(key)
    log = Log(folder / LOG, trainer.step) if ranks.leads else None
    window: list[Line] = []
    began, first = time.monotonic(), trainer.step
    while trainer.step < trainer.steps:
        window.append(trainer.one_step())
        step = trainer.step
        if step % table.log_every == 0 or step == trainer.steps:
            dead = float(trainer.dead.double().mean())
            seconds = time.monotonic() - began
            rate = (step - first) * table.batch / seconds
            means = {
                name: sum(line[name] for line in window) / len(window) for name in window[0] if name != "lr"
            }
            line = {
                "step": step,
                "steps": trainer.steps,
                **means,
                "lr": window[-1]["lr"],
                "dead": dead,
                "samples": step * table.batch,
            }
            line |= {"samples_per_s": rate, "left_s": (trainer.steps - step) * table.batch / rate}
            window = []
            if log is not None:
                log.write(line)
                on_line(line)
        if step % table.checkpoint_every == 0 or step == trainer.steps:
            write_checkpoint(trainer, folder / CHECKPOINT, same)
    ranks.barrier()
    trainer.part()


class Log:
    """A JSONL file, one line per some steps. Lines of steps after ``step`` are of an attempt that was cut
    off, and are dropped. ``checksum`` in each line is the CRC-32 of it and of all lines before it, so that a
    lost line shows too."""

    def __init__(self, path: Path, step: int) -> None:
        """Raises as :func:`read_log`."""
        self.path, self._crc = path, 0
        kept = [line for line in read_log(path) if line["step"] <= step]
        with replaced_atomically(path) as file:
            file.write("".join(map(self._sealed, kept)).encode())

    def write(self, line: Line) -> None:
        """Appends a line."""
        with explained_storage(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(self._sealed(line))

    def _sealed(self, line: Line) -> str:
        self._crc = _crc_of_line(line, self._crc)
        return json.dumps({**line, "checksum": f"crc32:{self._crc:08x}"}) + "\n"


def _crc_of_line(line: Line, before: int) -> int:
    return zlib.crc32(json.dumps(line).encode(), before)


def read_log(path: Path) -> list[Line]:
    """The lines of a log, without their checksums; a last one that was cut off is left out, none when there
    is no log.

    Raises ``DamagedStoreError`` when a line is not what was written, or lines before it are lost.
    """
    return _read_log(path)[0]


def check_log(path: Path) -> int:
    """Raises as :func:`read_log`; how many lines of an earlier version have no checksum."""
    found, checked = _read_log(path)
    return 0 if checked else len(found)


def _read_log(path: Path) -> tuple[list[Line], bool]:
    """The lines, and whether they have checksums."""
    if not path.exists():
        return [], True
    *whole, _ = whole_file(path).split(b"\n")
    lines = [_parsed(text) for text in whole]
    if not any(line is not None and is_sealed(line) for line in lines):
        return [line for line in lines if line is not None], not lines
    found, crc = [], 0
    for number, line in enumerate(lines, 1):
        said = None if line is None else line.pop("checksum", None)
        crc = 0 if line is None else _crc_of_line(line, crc)
        if line is None or said != f"crc32:{crc:08x}":
            again = (
                "delete it and run the same command again, which goes on from the checkpoint with a "
                "log from there"
            )
            raise DamagedStoreError(
                f"{path} is damaged in line {number}, or lines before it are lost: {again}"
            )
        found.append(line)
    return found, True


def _parsed(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def write_checkpoint(trainer: Trainer, path: Path, key: str) -> None:
    """All that is needed to go on, in one safetensors file. All processes take part; the first one writes."""
    from safetensors.torch import save

    cursors = trainer.ranks.objects(trainer.batches.cursor)
    if not trainer.ranks.leads:
        return
    about = {"key": key, "step": str(trainer.step), "cursors": json.dumps(cursors)}
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in trainer.state().items()}
    about["checksum"] = _checksum(tensors, about)
    with replaced_atomically(path) as file:
        file.write(save(tensors, about))


def _checksum(tensors: dict[str, torch.Tensor], about: dict[str, str]) -> str:
    """The CRC-32 of everything in a checkpoint but itself."""
    said = [[k, v] for k, v in sorted(about.items()) if k != "checksum"]
    found = zlib.crc32(json.dumps(said).encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = (
            zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found) if tensor.numel() else found
        )
    return f"crc32:{found:08x}"


def check_checkpoint(path: Path) -> int:
    """Raises when a checkpoint is not what was written; 1 for one of an earlier version, which has no
    checksum.
    """
    return int("checksum" not in _checkpoint(path)[0])


def _checkpoint(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor], int, list[dict[str, int]]]:
    from safetensors import SafetensorError, safe_open

    with opened_file(path):
        pass
    try:
        with safe_open(os.fspath(path), "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step, cursors = int(about["step"]), _cursors(about["cursors"])
    except (SafetensorError, KeyError, ValueError, OSError, RuntimeError) as error:
        raise IncompatibleError(
            f"the checkpoint {path} cannot be read ({error}): {_FROM_THE_START}"
        ) from error
    checked = set(about) == {"key", "step", "cursors", "checksum"}
    if (
        (about["checksum"] != _checksum(tensors, about))
        if checked
        else set(about) != {"key", "step", "cursors"}
    ):
        raise DamagedStoreError(
            f"the checkpoint {path} is damaged: it is not what was written; {_FROM_THE_START}"
        )
    return about, tensors, step, cursors


def _cursors(text: str) -> list[dict[str, int]]:
    found = parse_json(text)
    if not (isinstance(found, list) and found and all(isinstance(c, dict) for c in found)) or any(
        type(n) is not int or n < 0 for cursor in found for n in cursor.values()
    ):
        raise ValueError("it does not say where each process stood")
    return found


def read_checkpoint(trainer: Trainer, path: Path, key: str) -> None:
    """Takes a trainer to where a checkpoint was written, when there is one. Raises ``DamagedStoreError`` or
    another ``FeatureInterpError`` when it cannot be gone on from."""
    if not path.exists():
        return
    about, tensors, step, cursors = _checkpoint(path)
    if about.get("key") != key:
        raise IncompatibleError(
            f"{path.parent} holds a run with other settings or data: train into another folder, or delete "
            "this one"
        )
    try:
        trainer.restore(tensors, step, cursors[trainer.ranks.rank % len(cursors)])
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
        why = " ".join(str(error).split())[:200]
        raise IncompatibleError(
            f"the checkpoint {path} is not of this run ({why}): {_FROM_THE_START}"
        ) from error
