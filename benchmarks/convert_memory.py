"""How much memory does converting a checkpoint take?  `python benchmarks/convert_memory.py [--megabytes 2048]`

Writes a synthetic LLaDA-8B checkpoint (wide tables, one layer) into a temporary folder, converts it in a process of its own
and prints by how much that process grew above the interpreter and its imports, as JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH = 1024
PROGRAM = """
import resource, sys
from pathlib import Path
from medv.checkpoints.convert import convert
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), quiet=True)
print(peak() - before)
"""


def write_checkpoint(folder: Path, megabytes: int) -> int:
    """A float32 checkpoint in LLaDA-8B's layout; returns its size in bytes."""
    rows = megabytes * 2**20 // (2 * 4 * WIDTH)
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (WIDTH, WIDTH))
    layer = {"attn_norm": (WIDTH,), "ff_norm": (WIDTH,), "ff_proj": (64, WIDTH), "up_proj": (64, WIDTH), "ff_out": (WIDTH, 64)}
    tensors = {f"model.transformer.blocks.0.{name}.weight": torch.zeros(s) for name, s in (layer | square).items()}
    outer = {"wte": (rows, WIDTH), "ff_out": (rows, WIDTH), "ln_f": (WIDTH,)}
    tensors |= {f"model.transformer.{name}.weight": torch.zeros(shape) for name, shape in outer.items()}
    save_file(tensors, folder / "model.safetensors")
    config = {"d_model": WIDTH, "mlp_hidden_size": 64, "n_layers": 1, "n_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return (folder / "model.safetensors").stat().st_size


def main() -> None:
    """Write, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2048)
    megabytes = parser.parse_args().megabytes
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        source.mkdir()
        size = write_checkpoint(source, megabytes)
        command = [sys.executable, "-c", PROGRAM, source, Path(name) / "tower"]
        grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(json.dumps({"checkpoint_bytes": size, "peak_growth_bytes": grown}))


if __name__ == "__main__":
    main()
