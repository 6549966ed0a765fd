"""Every way to sample against the official algorithm: `python benchmarks/sampler.py --preset gpu --out benchmarks/h200.json`.

The same as `medv bench sampler`, whose options it takes; the logic is in `medv.companion.bench.sampler`.
"""

import sys

from medv.cli import app

if __name__ == "__main__":
    app(["bench", "sampler", *sys.argv[1:]])
