"""How far caches lead from the exact answers of the bundled tiny model: `python benchmarks/cache_agreement.py --out FILE.csv`.

One row for each kind of cache and refresh interval; the logic is in `medv.companion.bench.cache_agreement`.
"""

import argparse
from pathlib import Path

from medv.artifacts import write_text
from medv.checkpoints.bundled import bundled
from medv.companion.bench.cache_agreement import cache_agreement
from medv.companion.studies.vqa_study import sampler_config
from medv.evaluation.answering import Answerer
from medv.phantoms.sets import description_set
from medv.profiles import get_profile


def main() -> None:
    """Measure and print, and write the rows where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=16, help="held-out requests for descriptions of phantoms")
    parser.add_argument("--profile", default="tiny", help="whose L, B and Z of descriptions are used")
    parser.add_argument("--model", type=Path, help="a model folder; default: the bundled tiny model")
    parser.add_argument("--out", type=Path, help="a CSV file")
    arguments = parser.parse_args()
    config = sampler_config(get_profile(arguments.profile).describe)
    answerer = Answerer.load(arguments.model or bundled("tiny_model"))
    frame = cache_agreement(answerer, description_set("test", arguments.examples), config)
    print(frame.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    if arguments.out is not None:
        write_text(arguments.out, frame.to_csv(index=False))


if __name__ == "__main__":
    main()
