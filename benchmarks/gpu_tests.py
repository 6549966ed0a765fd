"""The tests that need a CUDA device, and what came of each as JSON: `python benchmarks/gpu_tests.py --out FILE.json`."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

from medv.artifacts import write_json
from medv.companion.bench.machine import bench_device, machine

TESTS = "tests/test_cuda.py"


class Outcomes:
    """Collects, as a plugin of pytest, how each test ended and how long it took."""

    def __init__(self):
        self.tests: dict[str, dict] = {}

    def pytest_runtest_logreport(self, report) -> None:
        """Called by pytest for the parts of each test; the test itself counts, and a part before or after it that fails."""
        if report.when == "call" or report.outcome != "passed":
            outcome = {"outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.failed:
                outcome["error"] = str(report.longrepr)[-3000:]
            self.tests[report.nodeid] = outcome


def main() -> int:
    """Run, write, and return pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    out, where = parser.parse_args().out, bench_device("cuda")
    outcomes = Outcomes()
    code = int(pytest.main(["-q", "-p", "no:cacheprovider", TESTS], plugins=[outcomes]))
    counts = {kind: sum(t["outcome"] == kind for t in outcomes.tests.values()) for kind in ("passed", "failed", "skipped")}
    peak = torch.cuda.max_memory_allocated(where)
    write_json(out, {**machine(where), "counts": counts, "peak_bytes": peak, "tests": outcomes.tests})
    return code


if __name__ == "__main__":
    sys.exit(main())
