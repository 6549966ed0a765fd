"""How fast the explorer answers the mouse: `python benchmarks/explorer.py --out FILE.json`.

Milliseconds of the kernel to show another Z of a finished sweep, and seconds of a fresh run of the bundled tiny model at
L = 64. The browser's part, drawing what arrives, is not in them.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from medv.artifacts import versions, write_json
from medv.checkpoints.bundled import bundled
from medv.companion.bench.machine import device_name
from medv.companion.explorer.session import Setting, gallery
from medv.companion.explorer.widgets import Explorer
from medv.evaluation.answering import Answerer

LENGTH = 64


def main() -> None:
    """Measure, print, and write the numbers where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="how often every Z is shown")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    explorer = Explorer(Answerer.load(bundled("tiny_model")), gallery(), setting=Setting(LENGTH, LENGTH // 2, LENGTH))
    explorer.question.value = "Describe the image in detail."
    explorer.sweep()  # the first runs warm up what torch sets up once
    explorer.wait()
    drags = []
    for steps in [steps for _ in range(arguments.repeats) for steps in explorer.drag.options]:
        before = time.perf_counter()
        explorer.drag.value = steps
        drags.append(1000 * (time.perf_counter() - before))
    explorer.choose(1)  # a picture that was not asked about
    explorer.fields["steps"].value = LENGTH
    before = time.perf_counter()
    explorer.answer()
    explorer.wait()
    seconds = time.perf_counter() - before
    found = {
        "device": device_name(torch.device("cpu")),
        "length": LENGTH,
        "drags": len(drags),
        "drag_ms_median": round(statistics.median(drags), 1),
        "drag_ms_max": round(max(drags), 1),
        "fresh_run_forwards": explorer.outcome.answer.forwards,
        "fresh_run_s": round(seconds, 3),
        "versions": versions(),
    }
    print(found)
    if arguments.out is not None:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
