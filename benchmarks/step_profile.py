"""Where the time of a cached forward goes, kernel by kernel, and what single products take: a probe, printed."""

import argparse
import time
from dataclasses import replace

import torch

from medv.diffusion.caching import DualCache
from medv.diffusion.settings import SamplerConfig
from medv.experiments.bench_sampler import PRESETS, _prompts, random_network


def products() -> None:
    """Milliseconds and TB/s of bf16 products by rows."""
    for wide, deep in ((4096, 4096), (12288, 4096), (24576, 4096), (4096, 12288), (126464, 4096)):
        count = max(2, int(3e8 // (wide * deep * 2)))
        weights = [torch.randn(wide, deep, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        for rows in (64, 256, 512, 1056, 8448):
            x = torch.randn(rows, deep, device="cuda", dtype=torch.bfloat16)
            for w in weights:
                torch.nn.functional.linear(x, w)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for k in range(30):
                torch.nn.functional.linear(x, weights[k % count])
            end.record()
            torch.cuda.synchronize()
            ms = begin.elapsed_time(end) / 30
            rates = f"{wide * deep * 2 / ms / 1e9:.2f} TB/s {2 * rows * wide * deep / ms / 1e9:.0f} TFLOP/s"
            print(f"{rows:5d} x {deep} -> {wide}: {ms:.4f} ms {rates}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    given = parser.parse_args()
    products()
    shape = replace(PRESETS["gpu"], layers=given.layers)
    network = random_network(shape, torch.device("cuda"), 0)
    for rows in given.rows:
        prompts = _prompts(shape, rows, torch.device("cuda"), 0)
        for graphs, compiled in ((False, False), (True, False), (False, True), (True, True)):
            how = {"graphs": graphs, "compiled": compiled}
            config = SamplerConfig(256, 64, 256, cache=DualCache(None))
            try:
                network.generate(prompts, config=replace(config, steps=16), **how)
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
                print(f"\n=== rows {rows} {how}: {wall / 40 * 1e3:.3f} ms a forward, host {host / 40 * 1e3:.3f} ms")
                if graphs:
                    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                        for _ in range(8):
                            next(steps)
                        torch.cuda.synchronize()
                    total: dict[str, list[float]] = {}
                    for event in profiler.events():
                        if event.device_type == torch.autograd.DeviceType.CUDA:
                            entry = total.setdefault(event.name[:110], [0, 0.0])
                            entry[0] += 1
                            entry[1] += event.device_time_total
                    for name, (count, spent) in sorted(total.items(), key=lambda item: -item[1][1])[:24]:
                        print(f"  {spent / 8:9.1f} us a forward {count / 8:6.1f} times  {name}")
                    print(f"  {sum(v[1] for v in total.values()) / 8:9.1f} us in all")
                steps.close()
            except Exception as error:
                print(f"\n=== rows {rows} {how} failed: {type(error).__name__}: {error}"[:1500])
        started = time.perf_counter()
        config = SamplerConfig(256, 64, 64, cache=DualCache(32))
        for _ in range(2):
            started = time.perf_counter()
            network.generate(prompts, config=config, graphs=True, compiled=True)
            torch.cuda.synchronize()
            print(f"rows {rows}, 4 tokens a forward, whole call: {time.perf_counter() - started:.3f} s")


if __name__ == "__main__":
    main()
