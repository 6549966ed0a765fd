"""Whether a run has the results of another: `python tests/compare_runs.py ONE OTHER` compares every CSV of OTHER but for times.

Times are columns of seconds, milliseconds and tokens a second, their ratios, and rows whose metric or unit is seconds.
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
    for column in {"metric", "unit"} & set(frame):
        frame = frame[frame[column] != "seconds"]
    return frame.reset_index(drop=True)


def main(one: Path, other: Path) -> int:
    """Print what differs or is missing in the first; 0 where all is equal."""
    names = sorted(file.name for file in (other / "figures").glob("*.csv"))
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
