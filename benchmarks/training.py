"""A training step against the way of the reference: `python benchmarks/training.py --preset gpu --out FILE.json`.

The same as `medv bench training`, whose options it takes; the logic is in `medv.companion.bench.training`.
"""

import sys

from medv.cli import app

if __name__ == "__main__":
    app(["bench", "training", *sys.argv[1:]])
