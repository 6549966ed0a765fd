"""Whether two run folders hold the same results: `python tests/compare_runs.py ONE OTHER` compares every CSV but for times.

Times are columns of seconds, milliseconds and tokens a second, their ratios, and rows whose metric is seconds.
"""

import re
import sys
from pathlib import Path

import pandas as pd

TIME = re.compile(r"second|\bms\b|\bs per\b|\bs/|/s\b|ratio|speed")


def untimed(file: Path) -> pd.DataFrame:
    """A result without its times."""
    frame = pd.read_csv(file)
    frame = frame[[column for column in frame if not TIME.search(column)]]
    return frame[frame["metric"] != "seconds"] if "metric" in frame else frame


def main(one: Path, other: Path) -> int:
    """Print what differs or is there once only; 0 where all is equal."""
    names = sorted({file.name for folder in (one, other) for file in (folder / "figures").glob("*.csv")})
    wrong = 0
    for name in names:
        files = [folder / "figures" / name for folder in (one, other)]
        if not all(file.is_file() for file in files) or not untimed(files[0]).equals(untimed(files[1])):
            print(f"{name} differs")
            wrong += 1
    print(f"{len(names)} results compared, {wrong} differ")
    return int(wrong > 0 or not names)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
