"""Where the time of a cached forward goes at LLaDA-8B's widths: `python benchmarks/step_profile.py --out FILE.json`.

Milliseconds and rates of the single matrix products by rows; and of a dual-cache forward (B = 64, random weights, `--layers`
of the 32) in each way to run it: a forward's wall time, the host's share, and the kernels of a replayed graph.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from medv.artifacts import write_json
from medv.companion.bench.machine import bench_device, machine
from medv.companion.bench.sampler import PRESETS, random_network
from medv.diffusion.caching import DualCache
from medv.diffusion.config import SamplerConfig

PRODUCTS = ((4096, 4096), (12288, 4096), (24576, 4096), (4096, 12288), (126464, 4096))  # outputs, inputs
WAYS = ((False, False), (True, False), (False, True), (True, True))  # graphs, compiled


def products() -> list[dict]:
    """bf16 products of `rows` states with one weight; different weights in turn, so that none waits in the cache."""
    found = []
    for wide, deep in PRODUCTS:
        count = max(2, int(3e8 // (wide * deep * 2)))
        weights = [torch.randn(wide, deep, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        for rows in (64, 128, 256, 512, 1056, 8448):
            states = torch.randn(rows, deep, device="cuda", dtype=torch.bfloat16)
            for weight in weights:
                torch.nn.functional.linear(states, weight)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for number in range(30):
                torch.nn.functional.linear(states, weights[number % count])
            end.record()
            torch.cuda.synchronize()
            ms = begin.elapsed_time(end) / 30
            rates = {"tb_a_second": wide * deep * 2 / ms / 1e9, "tflops": 2 * rows * wide * deep / ms / 1e9}
            found.append({"rows": rows, "inputs": deep, "outputs": wide, "ms": ms, **rates})
    return found


def step(network, prompts: torch.Tensor, graphs: bool, compiled: bool) -> dict:
    """Milliseconds of a cached forward in the middle of a block, and its kernels where a graph replays them."""
    how, config = {"graphs": graphs, "compiled": compiled}, SamplerConfig(256, 64, 256, cache=DualCache(None))
    network.generate(prompts, config=replace(config, steps=16), **how)  # warm
    steps = network.stream(prompts, config=config, tell=False, **how)
    for _ in range(5):
        next(steps)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(40):
        next(steps)
    host = time.perf_counter() - started
    torch.cuda.synchronize()
    wall = time.perf_counter() - started
    row = {"rows": len(prompts), **how, "ms": wall / 40 * 1e3, "host_ms": host / 40 * 1e3}
    return row | ({"kernels": kernels(steps)} if graphs else {})


def kernels(steps, forwards: int = 8) -> list[dict]:
    """The kernels of a forward by the time they take: microseconds and times a forward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(forwards):
            next(steps)
        torch.cuda.synchronize()
    total: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = total.setdefault(event.name[:120], [0, 0.0])
            entry[0] += 1
            entry[1] += event.device_time_total
    ordered = sorted(total.items(), key=lambda item: -item[1][1])[:30]
    return [{"name": n, "us": spent / forwards, "times": count / forwards} for n, (count, spent) in ordered]


def main() -> int:
    """Measure, print, write; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of the 32")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    given, device = parser.parse_args(), bench_device("cuda")
    found = {**machine(device), "layers": given.layers, "products": products(), "steps": [], "errors": {}}
    for row in found["products"]:
        print(*(f"{name} {value:.4g}" for name, value in row.items()), sep=", ")
    shape = replace(PRESETS["gpu"], layers=given.layers)
    network = random_network(shape, device, 0)
    for rows in (1, 8):
        prompts = torch.randint(0, 126000, (rows, shape.prompt_length), device=device)
        for graphs, compiled in WAYS:
            try:
                row = step(network, prompts, graphs, compiled)
            except Exception as error:
                name = f"batch of {rows}, graphs {graphs}, compiled {compiled}"
                found["errors"][name] = f"{type(error).__name__}: {error}"[:2000]
                print(name, "failed:", found["errors"][name], file=sys.stderr)
                continue
            found["steps"].append(row)
            print({name: value for name, value in row.items() if name != "kernels"})
            for kernel in row.get("kernels", ()):
                print(f"  {kernel['us']:9.1f} us {kernel['times']:6.1f} times  {kernel['name']}")
    write_json(given.out, found)
    return 1 if found["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
