"""What this machine computes fast: the device and the dtype that ``auto`` stands for.

A processor without bfloat16 instructions runs a bfloat16 model several times slower than a float32 one, so no
dtype is right everywhere. On x86 the instruction sets decide. Elsewhere, where they say too little, one
matrix product is measured in both dtypes, and what came out is kept in the cache folder.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from featureinterp.assets.fetch import cache_folder
from featureinterp.errors import StorageError, UnknownNameError
from featureinterp.stored.sums import read_cache, write_marker

AUTO = "auto"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHAPE = (512, 1536, 4096)
_SMALL = (64, 512, 512)
"""Shapes of the measured products: of a large model's layer, and one that is quick in an emulated dtype too.
"""
_MOST = 1e9
"""No machine has such a figure; one that is kept is damaged."""
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_ONEDNN_WITH_BFLOAT16 = ("ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10")
"""Values of ONEDNN_MAX_CPU_ISA (or their beginnings) under which torch's products still use bfloat16
instructions.
"""

_MALLOC = {
    "M_MMAP_THRESHOLD": (-3, 1 << 30),
    "M_TRIM_THRESHOLD": (-1, (1 << 31) - 1),
    "M_TOP_PAD": (-2, 1 << 26),
    "M_ARENA_MAX": (-8, 1),
}

Support = Literal["native", "emulated"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides the choice. ``instructions``: the widest instruction set that torch uses. ``bfloat16``: of
    the processor; ``accelerator``: ``cuda``, ``mps`` or None; ``accelerator_bfloat16``: whether it has
    bfloat16 of its own. ``measured``: times faster in float32 than in bfloat16, where that was measured."""

    processor: str
    instructions: str
    cores: int
    bfloat16: Support
    accelerator: str | None = None
    accelerator_name: str = ""
    accelerator_bfloat16: bool = False
    measured: float | None = None

    def native(self, dtype: str, device: str) -> bool:
        """Whether ``device`` computes in ``dtype`` without emulating it."""
        if dtype == "float32":
            return True
        if device == "cpu":
            return dtype == "bfloat16" and self.bfloat16 == "native"
        return dtype == "float16" or self.accelerator_bfloat16

    def device(self, name: str | None = None) -> str:
        """The device that ``name`` stands for."""
        return (self.accelerator or "cpu") if name in (None, AUTO) else str(name)

    def dtype(self, name: str | None = None, device: str | None = None, *, made_in: str | None = None) -> str:
        """The dtype that ``name`` stands for on ``device``. ``auto``: that of what was ``made_in`` one,
        bfloat16 otherwise, where the device has it, else float32. Raises ``UnknownNameError`` for a dtype
        that no model runs in."""
        if name not in (None, AUTO):
            if name not in DTYPES:
                raise UnknownNameError(
                    f"there is no dtype {name!r} for a model: choose auto, bfloat16, float16 or float32"
                )
            return str(name)
        wanted = made_in or "bfloat16"
        return wanted if self.native(wanted, _kind(self.device(device))) else "float32"

    def __str__(self) -> str:
        what = f"{self.processor} ({self.instructions}, {self.cores} core{'' if self.cores == 1 else 's'})"
        return f"{self.accelerator_name} and {what}" if self.accelerator else what

    def reason(self, dtype: str, device: str) -> str:
        """Why ``auto`` gives a dtype there, in a few words."""
        if _kind(device) != "cpu":
            return (
                f"{device} has bfloat16"
                if self.accelerator_bfloat16
                else f"{device} has no bfloat16 of its own"
            )
        if self.measured is not None:
            return f"measured: float32 is {self.measured:.1f} times as fast as bfloat16"
        return f"the processor has {'' if self.bfloat16 == 'native' else 'no '}bfloat16 instructions"


def _kind(device: str) -> str:
    return device.split(":", 1)[0]


@lru_cache(1)
def this_machine() -> Machine:
    """What this process runs on. torch's own switches (``ATEN_CPU_CAPABILITY``, ``ONEDNN_MAX_CPU_ISA``) count
    as the processor's limits.
    """
    keep_freed_memory()
    name, instructions = _processor(), torch.backends.cpu.get_cpu_capability()
    known = (
        x86_bfloat16(instructions, _capabilities(), os.environ)
        if platform.machine().lower() in ("x86_64", "amd64", "i686")
        else None
    )
    measured = None if known is not None else _measured(name)
    support: Support = known or ("emulated" if measured is not None and measured > 1 else "native")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(name, _named(instructions, support), cores, support, *_accelerator(), measured)


def keep_freed_memory() -> None:
    """Has the C library keep what is freed for the next layer, where it is glibc. By itself it hands every
    block of 32 MiB and more back to the system at once, and the page faults of asking again cost about as
    much as the matrix products."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for parameter, value in _MALLOC.values():
            library.mallopt(parameter, value)


def x86_bfloat16(
    instructions: str, capabilities: Mapping[str, Any], environment: Mapping[str, str]
) -> Support:
    """Whether a processor of the x86 family multiplies bfloat16 matrices with instructions of its own.
    ``instructions``: torch's capability; ``capabilities``: the processor's flags; ``environment``: may limit
    oneDNN, which computes the products."""
    limit = (environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or "ALL").upper()
    wide = not instructions.upper().startswith(("AVX2", "DEFAULT", "NO"))
    has = any(capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "avx10_1", "avx10_2"))
    return "native" if wide and has and limit.startswith(_ONEDNN_WITH_BFLOAT16) else "emulated"


def _capabilities() -> dict[str, Any]:
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }


def _processor() -> str:
    """The processor's name, as the system says it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123
            found = next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""
            )
    except OSError:
        found = ""
    return " ".join((found or platform.processor() or platform.machine() or "processor").split())


def _named(instructions: str, bfloat16: Support) -> str:
    if bfloat16 == "native" and instructions.upper().startswith("AVX512"):
        return "AVX512 with bfloat16"
    return instructions if instructions not in ("DEFAULT", "NO AVX") else platform.machine()


def _accelerator() -> tuple[str | None, str, bool]:
    """Device, name, and whether it has bfloat16."""
    if torch.cuda.is_available():
        return (
            "cuda",
            torch.cuda.get_device_name(0),
            torch.cuda.get_device_capability(0) >= (8, 0) or torch.version.hip is not None,
        )
    if torch.backends.mps.is_available():
        try:
            one = torch.ones(8, 8, dtype=torch.bfloat16, device="mps")
            return "mps", "Apple GPU", bool((one @ one)[0, 0].item() == 8)
        except (RuntimeError, TypeError):
            return "mps", "Apple GPU", False
    return None, "", False


def _measured(name: str) -> float:
    """Times that a matrix product takes longer in bfloat16 than in float32, measured once for each processor
    and version of torch.
    """
    return round(
        _known(name, "bfloat16 over float32", lambda: _product_s(torch.bfloat16) / _product_s(torch.float32)),
        3,
    )


def gflops(dtype: str, device: str = "cpu") -> float:
    """Billions of floating-point operations a second in a matrix product of the size of a model's: measured
    in about half a second. The best figure so far is kept for each machine, number of threads, dtype and
    device, since other work only makes a figure smaller."""
    machine = this_machine()
    name = machine.processor if _kind(device) == "cpu" else f"{machine.accelerator_name} {device}"
    shape = _SHAPE if machine.native(dtype, _kind(device)) else _SMALL
    what = f"{dtype}, {torch.get_num_threads()} threads, GFLOP/s"
    flops = 2e-9 * shape[0] * shape[1] * shape[2]
    return round(_known(name, what, lambda: flops / _product_s(DTYPES[dtype], device, shape), again=True), 1)


def _known(name: str, what: str, measure: Callable[[], float], *, again: bool = False) -> float:
    """A figure that was measured before, or is now; ``again``: is measured again, and the larger one counts.
    It is kept in ``machine.json`` of the cache folder."""
    path = cache_folder() / "machine.json"
    key = f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}: {what}"
    limits = [f"{limit}={os.environ[limit]}" for limit in _LIMITS if limit in os.environ]
    key = " ".join([key, *limits])
    known = read_cache(path) or {}
    before = known.get(key)
    known_one = (
        float(before)
        if isinstance(before, (int, float)) and before is not True and 0 < before < _MOST
        else None
    )
    if known_one is not None and not again:
        return known_one
    figure = measure()
    if known_one is not None and known_one >= figure:
        return known_one
    with suppress(
        StorageError
    ):  # a cache that cannot be written only means that the next process measures again
        write_marker(path, {**known, key: figure})
    return figure


def _product_s(dtype: torch.dtype, device: str = "cpu", shape: tuple[int, int, int] = _SMALL) -> float:
    """Seconds of one product, the best of five."""
    n, k, m = shape
    one, other = (torch.ones(shape, dtype=dtype, device=device) for shape in ((n, k), (k, m)))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.matmul(one, other).sum().item()  # reading a value waits for a GPU
        times.append(time.perf_counter() - start)
    return min(times)


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; None or ``auto``: the GPU (CUDA or Apple's) when there is one, else the CPU.
    Raises ``UnknownNameError`` for one that cannot be used."""
    try:
        device = torch.device(this_machine().device(name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UnknownNameError(
            f"the device {name!r} cannot be used ({reason}): give auto, cpu, cuda or mps"
        ) from error
    return device


def pick_dtype(
    name: str | None = None, device: str | torch.device | None = None, *, made_in: str | None = None
) -> torch.dtype:
    """The dtype of that name; None or ``auto``: the best of the device, see :meth:`Machine.dtype`."""
    return DTYPES[this_machine().dtype(name, None if device is None else str(device), made_in=made_in)]


def memory_bytes() -> int | None:
    """Memory of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def choice(dtype: str | None = None, device: str | None = None) -> dict[str, str]:
    """What ``auto`` comes to here, for a screen and for provenance: ``machine``, ``device``, ``dtype`` and
    why.
    """
    machine = this_machine()
    on = machine.device(device)
    chosen = machine.dtype(dtype, on)
    reason = machine.reason(chosen, on) if dtype in (None, AUTO) else "as asked for"
    return {"machine": str(machine), "device": on, "dtype": chosen, "why": reason}
