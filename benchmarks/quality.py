"""Every sampling strategy at equal forwards: `python benchmarks/quality.py --out benchmarks/results/quality_cpu.json`.

On the oracle and, with the facts of its descriptions, on the bundled tiny model (or `--model`). Prints a table for each and
what the adaptive schedule with the veto does to repetition; the logic is in `medv.companion.studies.fast_sampling`.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from medv.artifacts import fingerprint, versions, write_json
from medv.checkpoints.bundled import bundled
from medv.companion.bench.machine import device_name
from medv.companion.studies import fast_sampling as quality
from medv.companion.studies.vqa_study import sampler_config
from medv.diffusion.config import SamplerConfig
from medv.evaluation.answering import Answerer
from medv.phantoms.sets import description_set
from medv.profiles import get_profile

SEEN = ["forwards", "adjacent_duplicates", "longest_run", "rep_2", "rep_4", "distinct_1", "distinct_2"]
ORACLE = ["log_likelihood", "bigram_distance", "token_accuracy"]
FACTS = ["f1", "precision", "recall"]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judges", nargs="+", choices=("oracle", "model"), default=["oracle", "model"])
    parser.add_argument("--strategies", nargs="+", help="default: all there are")
    parser.add_argument("--texts", type=int, default=64, help="texts of the oracle for each of two chains")
    parser.add_argument("--descriptions", type=int, default=100, help="held-out phantoms to describe")
    parser.add_argument("--split", default="test", help="of the phantoms")
    parser.add_argument("--model", type=Path, help="a model folder; default: the bundled tiny model")
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args()
    known = quality.chosen(given.strategies) if given.strategies else quality.strategies()
    result = {"device": device_name(torch.device("cpu")), "versions": versions()}
    if "oracle" in given.judges:
        config, started = SamplerConfig(128, 64, 128), time.perf_counter()
        items = quality.oracle_quality(known, config, quality.budgets(config), texts=given.texts, quiet=False)
        result["oracle"] = _result(items, config, "log_likelihood", SEEN + ORACLE, started)
    if "model" in given.judges:
        config, started = sampler_config(get_profile("tiny").describe), time.perf_counter()
        folder = given.model or bundled("tiny_model")
        examples = description_set(given.split, given.descriptions)
        items = quality.model_quality(known, Answerer.load(folder), examples, config, quality.budgets(config), quiet=False)
        result["model"] = _result(items, config, "f1", SEEN + FACTS, started) | {"weights": fingerprint(folder)}
    if given.out is not None:
        write_json(given.out, result)


def _result(items: pd.DataFrame, config: SamplerConfig, keeps: str, columns: list[str], started: float) -> dict:
    summary = quality.summarize_quality(items)
    print(quality.beside(summary, columns).round(2).to_string(index=False))
    names = [name for name in items["strategy"].unique() if name not in (quality.BASE, quality.TEXT)]
    compared = {name: quality.against(items, name) for name in names}
    verdicts = quality.verdicts(compared[quality.OURS], keeps=keeps) if quality.OURS in compared else []
    print(f"\n{quality.OURS} beside {quality.BASE}:", *verdicts, "", sep="\n")
    return {
        "L, B": [config.gen_length, config.block_length],
        "seconds": round(time.perf_counter() - started, 1),
        "verdicts": verdicts,
        "summary": summary.to_dict("records"),
        "against fixed": [{"strategy": name} | row for name in names for row in compared[name].to_dict("records")],
    }


if __name__ == "__main__":
    main()
