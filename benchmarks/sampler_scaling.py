"""Cost of one forward of the samplers as the response, the prompt and the vocabulary grow.

`python benchmarks/sampler_scaling.py [--out FILE]` prints, in one run, milliseconds a forward of the exact sampler and of the
dual cache (refresh left out: one fill a block) on random weights, and the growth against the first row of each sweep. The
claims that it lets one check: a cached forward grows with the block, not with L; an exact one linearly with the canvas; the
vocabulary is paid for the open positions of a block alone, so its share does not grow with the prompt.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from medv.artifacts import write_json
from medv.companion.bench.machine import device_name
from medv.companion.bench.sampler import BenchShape, Mode, measure_mode
from medv.diffusion.caching import DualCache

BASE = BenchShape(vocab_size=32000, layers=2, gen_length=128, block_length=32)
SWEEPS = {"gen_length": (64, 128, 256), "prompt_length": (200, 800, 1600), "vocab_size": (32000, 64000, 126464)}
MODES = (Mode("exact", tokens_a_forward=8), Mode("dual cache", DualCache(10_000), tokens_a_forward=8))


def measure(base: BenchShape = BASE, sweeps: dict[str, tuple[int, ...]] = SWEEPS) -> list[dict]:
    """One row for each mode and value: milliseconds a forward, and the ratio to the first value of the sweep."""
    rows = []
    for field, values in sweeps.items():
        for mode in MODES:
            first = None
            for value in values:
                found = measure_mode(replace(base, **{field: value}), mode)
                cost = 1e3 * found.seconds / found.forwards
                first = first or cost
                rows.append({"mode": mode.name, "varied": field, "value": value, "ms_a_forward": cost, "growth": cost / first})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    out = parser.parse_args().out
    result = {"device": device_name(torch.device("cpu")), "shape": asdict(BASE), "rows": measure()}
    print(json.dumps(result, indent=1))
    if out is not None:
        write_json(out, result)
