"""Checkpoints from an enemy: no code runs, nothing is a traceback, and memory stays in proportion to the
file.

Each attack changes a good checkpoint of one layout. It either still loads, and then encodes to finite
numbers, or is refused in one sentence. All of them are seeded, so that a failure names an attack that can be
run again.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from featureinterp.errors import FeatureInterpError
from featureinterp.sae.load import load_sae

D_IN, D_SAE = 6, 12
LAYOUTS = ("own", "saelens", "dictionary_learning", "gemma_scope")
CONFIGS = {"own": "config.json", "saelens": "cfg.json", "dictionary_learning": "config.json"}
WEIGHTS = {
    "own": "weights.safetensors",
    "saelens": "sae_weights.safetensors",
    "dictionary_learning": "ae.pt",
    "gemma_scope": "params.npz",
}
SCOPE = Path("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_9")


def tensors(seed: int = 0, d_in: int = D_IN) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(D_SAE, d_in, generator=generator), dim=1)
    return {
        "W_enc": decoder.T.contiguous(),
        "W_dec": decoder,
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(d_in),
    }


def linear(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of ``ae.pt``."""
    names = {
        "encoder.weight": t["W_enc"].T,
        "decoder.weight": t["W_dec"].T,
        "encoder.bias": t["b_enc"],
        "b_dec": t["b_dec"],
    }
    return {name: value.contiguous() for name, value in names.items()} | {
        "k": torch.tensor(4),
        "threshold": torch.tensor(-1.0),
    }


def config_of(layout: str) -> dict[str, Any]:
    hook = "blocks.1.hook_resid_post"
    if layout == "own":
        return {
            "format": 1,
            "architecture": "topk",
            "d_in": D_IN,
            "d_sae": D_SAE,
            "hook": hook,
            "model": "tiny",
            "k": 4,
        }
    if layout == "saelens":
        metadata = {"hook_name": hook, "model_name": "tiny"}
        return {"architecture": "topk", "d_in": D_IN, "d_sae": D_SAE, "k": 4, "metadata": metadata}
    sizes = {"activation_dim": D_IN, "dict_size": D_SAE, "layer": 1, "lm_name": "tiny", "k": 4}
    return {
        "trainer": {"trainer_class": "TopKTrainer", **sizes, "submodule_name": "resid_post_layer_1"},
        "buffer": {"d_submodule": D_IN, "io": "out"},
    }


def saved(value: object) -> bytes:
    body = io.BytesIO()
    torch.save(value, body)
    return body.getvalue()


def arrays(t: dict[str, torch.Tensor]) -> bytes:
    body = io.BytesIO()
    np.savez(
        body, **{name: value.numpy() for name, value in t.items()}, threshold=np.zeros(D_SAE, np.float32)
    )
    return body.getvalue()


def make(folder: Path, layout: str) -> Path:
    """A good checkpoint of a layout; the folder to load."""
    place = folder / SCOPE if layout == "gemma_scope" else folder
    place.mkdir(parents=True, exist_ok=True)
    if layout in CONFIGS:
        (place / CONFIGS[layout]).write_text(json.dumps(config_of(layout)))
    if layout == "gemma_scope":
        body = arrays(tensors(d_in=2304))
    else:
        body = saved(linear(tensors())) if layout == "dictionary_learning" else save_safetensors(tensors())
    (place / WEIGHTS[layout]).write_bytes(body)
    return place


def survives(place: Path, what: str) -> bool:
    """Whether an SAE was loaded. Everything but a refusal in one sentence, or finite codes, is a failure."""
    try:
        sae = load_sae(str(place)).sae
        codes = sae.encode(torch.randn(5, sae.d_in, generator=torch.Generator().manual_seed(1)) * 30)
    except FeatureInterpError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1500, what
        return False
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    assert bool(torch.isfinite(codes.values).all()), what
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_unchanged_checkpoints_load(layout: str, tmp_path: Path):
    assert survives(make(tmp_path, layout), layout)


ODD: tuple[object, ...] = (
    True, False, None, -1, 0, 4.7, 4.0, 10**30, -(10**30), 1 << 24, 1 << 63, 1e308, float("nan"),
    float("inf"), "4", "", "x" * 10_000,
    "\n\x1b[31m", "\u202e", [], [4], {}, {"k": 4}, [[[[]]]],
)  # fmt: skip


def keys_of(value: dict[str, Any]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, inner in value.items():
        found += [(key,)] + ([(key, *rest) for rest in keys_of(inner)] if isinstance(inner, dict) else [])
    return found


def put(value: dict[str, Any], key: tuple[str, ...], new: object) -> None:
    for part in key[:-1]:
        value = value[part]
    value[key[-1]] = new


EXTRA: dict[str, list[tuple[str, ...]]] = {
    "own": [("normalize",)],
    "dictionary_learning": [("buffer", "io")],
    "saelens": [
        (key,)
        for key in (
            "activation_fn", "activation_fn_str", "activation_fn_kwargs", "normalize_activations",
            "reshape_activations", "hook_point",
            "apply_b_dec_to_input", "finetuning_scaling_factor", "rescale_acts_by_decoder_norm",
            "prepend_bos", "seqpos_slice",
            "model_from_pretrained_kwargs", "hook_name_out", "hook_head_index",
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize("layout", list(CONFIGS))
def test_values_of_configurations_that_are_none(layout: str, tmp_path: Path):
    """Every key with every odd value: more than 500 configurations."""
    place, loaded, tried = make(tmp_path, layout), [], 0
    for key in [*keys_of(config_of(layout)), *EXTRA[layout]]:
        for odd in ODD:
            config = config_of(layout)
            put(config, key, odd)
            (place / CONFIGS[layout]).write_text(json.dumps(config))
            tried += 1
            if survives(place, f"{layout} {key} = {odd!r:.60}"):
                loaded.append((key[-1], odd))
    assert tried >= 150
    for key, odd in loaded:
        assert key not in (
            "d_in",
            "d_sae",
            "activation_dim",
            "dict_size",
            "layer",
            "format",
            "architecture",
            "trainer_class",
        ), (key, odd)
        assert key != "k" or odd is None, f"k = {odd!r}"


TEXTS = (
    b"", b"{", b"[]", b"3", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 50_000,
    b'{"d_in": ' + b"9" * 5_000 + b"}", b"{}" * 2,
    b'{"d_in": 6, "d_in": 7}', b"\x00" * 64, b"\x80\x04.", b'{"a": "' + b"x" * (5 << 20) + b'"}',
    b"{}" + b" " * (5 << 20),
)  # fmt: skip


@pytest.mark.parametrize("layout", list(CONFIGS))
def test_configurations_that_are_no_json(layout: str, tmp_path: Path):
    place = make(tmp_path, layout)
    for text in TEXTS:
        (place / CONFIGS[layout]).write_bytes(text)
        assert not survives(place, f"{layout} {text[:40]!r}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_that_were_changed(layout: str, tmp_path: Path):
    """Cuts, flips, zeros and inserted bytes at random places of the weights; most near the ends, where the
    structure is.
    """
    place = make(tmp_path, layout)
    path = place / WEIGHTS[layout]
    whole, rng = path.read_bytes(), np.random.default_rng([7, LAYOUTS.index(layout)])
    for number in range(40):
        body = bytearray(whole)
        at = (
            int(rng.integers(len(body)))
            if number % 2
            else int(rng.choice([rng.integers(400), len(body) - 1 - rng.integers(400)]))
        )
        match int(rng.integers(5)):
            case 0:
                body = body[:at]
            case 1:
                body[at] ^= 1 << int(rng.integers(8))
            case 2:
                body[at : at + 16] = bytes(len(body[at : at + 16]))
            case 3:
                body[at:at] = rng.bytes(int(rng.integers(1, 40)))
            case 4:
                body[at : at + 8] = b"\xff" * len(body[at : at + 8])
        path.write_bytes(body)
        survives(place, f"{layout} change {number} at {at}")


def header(entries: object, body: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def declared(name: str, dtype: object, shape: object, place: object) -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": place}}


BODY = b"\x00" * 288
HEADERS: list[bytes] = [
    b"", b"\x01", header({}), header([]), header(b"{"), header({"W_enc": 3}), header({"W_enc": {}}),
    struct.pack("<Q", 1 << 63) + b"{}",
    struct.pack("<Q", 150 << 30) + b"{}", header(declared("W_enc", "F32", [6, 12], [0, 288])),
    header(b"[" * 10_000),
    *(header(declared("W_enc", dtype, [6, 12], [0, 288]), BODY) for dtype in ("F8_E4M3", "I64", "BOOL", "",
    None, 3, [], "f32")),
    *(
        header(declared("W_enc", "F32", shape, [0, 288]), BODY)
        for shape in ([6, -12], [1 << 40, 1 << 40], [10**30], ["6", 12], [True, 72], [6.0, 12], None, 72,
        [[6], 12], [0], [1] * 100, {})
    ),
    *(
        header(declared("W_enc", "F32", [6, 12], place), BODY)
        for place in ([0, 287], [-288, 0], [288, 0], [4, 292], [0, 1 << 62], [0], [], None, "0", [0, "288"],
        [0.0, 288], [True, 288], {})
    ),
    header(b'{"W_enc":{"dtype":"F32","shape":[6,12],"data_offsets":[0,288]},'
           b'"W_enc":{"dtype":"F32","shape":[6,12],"data_offsets":[0,288]}}', BODY),
    header({**declared("W_enc", "F32", [6, 12], [0, 288]), **declared("W_dec", "F32", [12, 6], [0, 288])},
    BODY * 2),
    header(b'{"W_enc":{"dtype":"F32","shape":[' + b"9" * 5_000 + b'],"data_offsets":[0,288]}}', BODY),
]  # fmt: skip


@pytest.mark.parametrize("layout", ["own", "saelens"])
def test_headers_of_safetensors_that_lie(layout: str, tmp_path: Path):
    place = make(tmp_path, layout)
    good = save_safetensors(tensors())
    length = struct.unpack("<Q", good[:8])[0]
    entries, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    lies = list(HEADERS)
    for name in entries:  # the whole file, with one lie in it
        for change in (
            {"shape": [-1]}, {"shape": [1 << 62, 1 << 62]}, {"dtype": "F64"}, {"data_offsets": [0, 8]},
            {"data_offsets": [0, 1 << 50]},
            {"shape": [True]}, {"dtype": "I32"},
            {"data_offsets": [entries[name]["data_offsets"][1], entries[name]["data_offsets"][0]]},
        ):  # fmt: skip
            lies.append(header({**entries, name: {**entries[name], **change}}, body))
    for number, lie in enumerate([*lies, header({**entries, "__metadata__": 3}, body)]):
        (place / WEIGHTS[layout]).write_bytes(lie)
        assert not survives(place, f"{layout} header {number}: {lie[8:120]!r}")


class Runs:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path: Path, how: int) -> None:
        self.path, self.how = str(path), how

    def __reduce__(self) -> tuple[object, ...]:
        if self.how == 0:
            return (Path.touch, (Path(self.path),))
        if self.how == 1:
            return (os.system, (f"touch {self.path}",))
        return (eval, (f"open({self.path!r}, 'w')",))


def changed(**changes: object) -> dict[str, Any]:
    return {**linear(tensors()), **changes}


def torch_values(mark: Path) -> list[object]:
    """What is no table of dense floats."""
    weight, empty = linear(tensors())["encoder.weight"], torch.empty(D_SAE, D_IN, device="meta")
    compressed = torch.eye(D_SAE, D_IN).to_sparse_csr()
    strided = torch.zeros(1).as_strided((D_SAE, D_IN), (0, 0))
    odd = (
        strided, weight.to_sparse(), compressed, empty, weight.bool(), weight.long(),
        weight.to(torch.complex64), weight.to(torch.float8_e4m3fn),
        torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), weight * float("nan"), weight * float("inf"),
        weight.T, weight[:5], weight[None],
        torch.zeros(0), torch.tensor(1.0), torch.nested.nested_tensor([weight]),
        torch.zeros(D_SAE, D_IN).fill_(3e38),
        torch.zeros(1, dtype=torch.float32).as_strided((1 << 31, 2), (0, 0)), 3, None, "text", [1],
        weight.numpy(), Runs(mark, 0),
    )  # fmt: skip
    ks = (
        torch.tensor(4.7), torch.tensor(True), torch.tensor(0), torch.tensor(-4), torch.tensor(13),
        torch.tensor(1 << 40), torch.tensor(float("nan")),
        torch.tensor([4]), torch.tensor(1e30), 4, None, torch.empty((), device="meta"), torch.tensor(4 + 0j),
        torch.tensor(5),
    )  # fmt: skip
    values: list[object] = [changed(**{"encoder.weight": value}) for value in odd]
    values += [changed(k=k) for k in ks]
    values += [changed(b_dec=torch.full((D_IN,), v)) for v in (3e38, float("nan"), float("-inf"))]
    values += [
        changed(**{"decoder.weight": torch.zeros(D_IN, D_SAE)}),
        changed(**{"_orig_mod.k": torch.tensor(3)}),
        {},
        [],
        3,
    ]
    values += [
        {3: torch.zeros(1)},
        torch.zeros(3),
        None,
        {"a\nb\x1b[31m": torch.zeros(1)},
        {"x" * 5000: torch.zeros(1)},
    ]
    return [*values, *(changed(extra=Runs(mark, how)) for how in range(3))]


def test_torch_files_that_hold_other_than_tensors(tmp_path: Path):
    place, mark = make(tmp_path, "dictionary_learning"), tmp_path / "it ran"
    path = place / "ae.pt"
    for number, value in enumerate(torch_values(mark)):
        path.write_bytes(saved(value))
        assert not survives(place, f"torch value {number}: {type(value).__name__}")
    for how in range(3):
        for body in (pickle.dumps(Runs(mark, how)), pickle.dumps({"k": Runs(mark, how)}, 0)):
            path.write_bytes(body)
            assert not survives(place, f"pickle {how}")
    old = io.BytesIO()
    torch.save(linear(tensors()), old, _use_new_zipfile_serialization=False)
    path.write_bytes(old.getvalue())
    assert not survives(place, "an old format, which says sizes before it has them")
    assert not mark.exists(), "no code of a file was run"


def repacked(
    body: bytes, change: Callable[[str, bytes], list[tuple[str, bytes]]], method: int = zipfile.ZIP_STORED
) -> bytes:
    """An archive whose members went through ``change``."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as source, zipfile.ZipFile(out, "w", method) as target:
        for entry in source.infolist():
            for name, content in change(entry.filename, source.read(entry)):
                target.writestr(name, content)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("layout", ["dictionary_learning", "gemma_scope"])
def test_archives_that_lie(layout: str, tmp_path: Path):
    place = make(tmp_path, layout)
    path = place / WEIGHTS[layout]
    whole = path.read_bytes()
    names = zipfile.ZipFile(io.BytesIO(whole)).namelist()
    for name in names:
        for number, change in enumerate(
            (
                lambda n, c, name=name: [] if n == name else [(n, c)],
                lambda n, c, name=name: [(n, c), (n, c)] if n == name else [(n, c)],
                lambda n, c, name=name: [(n, c[: len(c) // 2])] if n == name else [(n, c)],
                lambda n, c, name=name: [(n, c + bytes(64))] if n == name else [(n, c)],
                lambda n, c, name=name: [(n, b"")] if n == name else [(n, c)],
            )
        ):
            path.write_bytes(repacked(whole, change))
            loaded = survives(place, f"{layout} {name} change {number}")
            assert not (loaded and number == 1), "two members of one name"
    end = whole.rfind(b"PK\x05\x06")
    for offset, value in (
        (10, b"\xff\xff"),
        (12, b"\xff\xff\xff\x7f"),
        (12, b"\0\0\0\0"),
        (16, b"\xff\xff\xff\xff"),
        (16, b"\0\0\0\0"),
    ):
        path.write_bytes(whole[: end + offset] + value + whole[end + offset + len(value) :])
        survives(place, f"{layout} directory {offset}")
    path.write_bytes(
        repacked(
            whole,
            lambda n, c: [(n, c), *((f"{n}/{i}", b"") for i in range(5_000))] if n == names[0] else [(n, c)],
        )
    )
    assert not survives(place, "thousands of members")


NPY = b"\x93NUMPY\x01\x00"


def npy(text: str, body: bytes = b"") -> bytes:
    return NPY + struct.pack("<H", len(text)) + text.encode() + body


def test_array_headers_that_lie(tmp_path: Path):
    place = make(tmp_path, "gemma_scope")
    path, whole = place / "params.npz", (place / "params.npz").read_bytes()
    size = 4 * 2304 * D_SAE
    form = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}"
    shapes = (
        "(2304, -12)",
        "(99999999999, 99999999999)",
        "(2304, True)",
        "(2304.0, 12)",
        "2304",
        "()",
        "(2304,)",
        "('2304', 12)",
        "(10**30,)",
    )
    bodies = [npy(form.format("'<f4'", shape), bytes(size)) for shape in shapes]
    types = (
        "'O'",
        "'|V4'",
        "'<U1'",
        "'<c8'",
        "'<i4'",
        "'<f16'",
        "'<f3'",
        "[('a', '<f4')]",
        "None",
        "3",
        "''",
        "'<M8[ns]'",
    )
    bodies += [npy(form.format(dtype, "(2304, 12)"), bytes(size)) for dtype in types]
    bodies += [
        npy(form.format("'<f4'", "(2304, 12)")),
        NPY,
        b"",
        NPY[:6] + b"\x09\x00",
        npy("{"),
        npy("(" * 5_000),
        npy("__import__('os')"),
    ]
    bodies += [
        npy("9" * 5_000),
        NPY[:6] + b"\x02\x00" + struct.pack("<I", 1 << 31),
        npy("{'shape': (1,)}"),
        npy("\x00"),
        npy("[" * 9_000),
    ]
    bodies += [
        npy(form.format("'<f4'", "(2304, 12)"), np.full(2304 * D_SAE, v, "<f4").tobytes())
        for v in (np.nan, np.inf, 3e38)
    ]
    for name in ("W_enc.npy", "b_dec.npy"):
        for number, body in enumerate(bodies):
            path.write_bytes(
                repacked(whole, lambda n, c, body=body, name=name: [(n, body if n == name else c)])
            )
            assert not survives(place, f"{name} {number}: {body[:120]!r}")


def test_what_is_no_file(tmp_path: Path):
    for layout in LAYOUTS:
        for number in range(4):
            place = make(tmp_path / layout / str(number), layout)
            names = [WEIGHTS[layout], *([CONFIGS[layout]] if layout in CONFIGS else [])]
            for name in names:
                keep = (place / name).read_bytes()
                (place / name).unlink()
                match number:
                    case 0:
                        os.mkfifo(place / name)
                    case 1:
                        (place / name).symlink_to("/dev/zero")
                    case 2:
                        (place / name).mkdir()
                    case 3:
                        (place / name).symlink_to(name)
                assert not survives(place, f"{layout} {name} {number}")
                (place / name).rmdir() if number == 2 else (place / name).unlink()
                (place / name).write_bytes(keep)


WATCHED = """
import resource, sys
from pathlib import Path
from featureinterp.errors import FeatureInterpError
from featureinterp.sae.load import load_sae
import safetensors.torch, numpy.lib.format
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for place in sys.argv[1:]:
    size = sum(p.stat().st_size for p in Path(place).iterdir())
    before = peak()
    try:
        load_sae(place)
        print("loaded", place)
    except FeatureInterpError as error:
        pass
    grown = peak() - before
    assert grown < 2 * size + (200 << 20), (place, grown, size)
print("held")
"""


def bombs(folder: Path) -> list[Path]:
    """Small files that ask for much."""
    places = [make(folder / f"{layout}{number}", layout) for layout in LAYOUTS for number in range(4)]
    torch_places, scope_places = places[8:12], places[12:16]
    good = (torch_places[0] / "ae.pt").read_bytes()
    zeros = bytes(600 << 20)
    for place, change in (
        (torch_places[0], lambda n, c: [(n, zeros if n.endswith("data/0") else c)]),
        (torch_places[1], lambda n, c: [(n, c + zeros if n.endswith("data.pkl") else c)]),
    ):
        (place / "ae.pt").write_bytes(repacked(good, change, zipfile.ZIP_DEFLATED))
    wide = {**config_of("dictionary_learning")["trainer"], "activation_dim": 1 << 16, "dict_size": 1 << 16}
    scalar = torch.zeros(1)
    stride0 = {
        "encoder.weight": scalar.as_strided((1 << 16, 1 << 16), (0, 0)),
        "decoder.weight": scalar.as_strided((1 << 16, 1 << 16), (0, 0)),
        "encoder.bias": scalar.as_strided((1 << 16,), (0,)),
        "b_dec": scalar.as_strided((1 << 16,), (0,)),
        "k": torch.tensor(4),
    }
    config = {"trainer": wide, "buffer": {}}
    for place, value in (
        (torch_places[2], stride0),
        (torch_places[3], {**stride0, "encoder.weight": torch.empty(1 << 16, 1 << 16, device="meta")}),
    ):
        (place / "config.json").write_text(json.dumps(config))
        (place / "ae.pt").write_bytes(saved(value))
    arrays = (scope_places[0] / "params.npz").read_bytes()
    huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (2304, 16777216), }"
    for place, body in (
        (scope_places[0], npy(huge)),
        (
            scope_places[1],
            npy(
                "{'descr': '<f4', 'fortran_order': False, 'shape': (2304, 65536), }",
                zeros[: 4 * 2304 * 65536],
            ),
        ),
        (scope_places[2], NPY[:6] + b"\x02\x00" + struct.pack("<I", 500 << 20) + zeros[: 500 << 20]),
    ):
        method = zipfile.ZIP_STORED if len(body) < 1 << 20 else zipfile.ZIP_DEFLATED
        (place / "params.npz").write_bytes(
            repacked(arrays, lambda n, c, body=body: [(n, body if n == "W_enc.npy" else c)], method)
        )
    big = {"own": {"d_in": 1 << 16, "d_sae": 1 << 20}, "saelens": {"d_in": 1 << 16, "d_sae": 1 << 20}}
    for place, layout in ((places[0], "own"), (places[4], "saelens")):
        (place / CONFIGS[layout]).write_text(json.dumps({**config_of(layout), **big[layout]}))
        lie = declared("W_enc", "F32", [1 << 16, 1 << 20], [0, 1 << 38])
        (place / WEIGHTS[layout]).write_bytes(header(lie, bytes(64)))
    (places[1] / "config.json").write_bytes(b'{"a": [' + b"{}," * (1_300_000) + b"{}]}")
    with (places[5] / "cfg.json").open("wb") as file:
        file.truncate(1 << 34)
    with (places[2] / WEIGHTS["own"]).open("wb") as file:
        file.write(struct.pack("<Q", 1 << 33))
        file.truncate(1 << 34)
    return places


@pytest.mark.slow
def test_small_files_that_ask_for_much(tmp_path: Path):
    """In a process of its own, whose memory never grew by more than twice the files and 200 MB."""
    places = [str(place) for place in bombs(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *places], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0 and "held" in done.stdout, done.stderr[-2000:]
    assert done.stdout.count("loaded") == 4, "those that were left as they are"
