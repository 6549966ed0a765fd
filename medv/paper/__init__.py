"""The numbers printed in the LLaDA-MedV paper (Tables 1 to 8), as CSV, and their reader.

Nothing is computed, corrected or added, and nothing of ours ever stands here. A missing value is a cell that the paper leaves
empty. `table1_counts` is the row of question counts under the head of Table 1.
"""

from importlib import resources

import pandas as pd

TABLES = ("table1", "table1_counts", "table2", "table3", "table4", "table5", "table6", "table7", "table8")


def table(name: str) -> pd.DataFrame:
    """One table as the paper prints it, e.g. `table("table2")`; scores in percent. Raises ValueError for an unknown name."""
    if name not in TABLES:
        raise ValueError(f"the paper has no table {name!r}: choose from {', '.join(TABLES)}")
    with resources.files(__name__).joinpath("tables", f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)
