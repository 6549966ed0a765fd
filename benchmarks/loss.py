"""The loss against full logits: `python benchmarks/loss.py --preset gpu --out FILE.json`.

The same as `medv bench loss`, whose options it takes; the logic is in `medv.companion.bench.loss`.
"""

import sys

from medv.cli import app

if __name__ == "__main__":
    app(["bench", "loss", *sys.argv[1:]])
