"""Tables: ours beside the paper's, as text and HTML.

The paper's numbers keep to their own columns and are never averaged, ranked or drawn with ours.
"""

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd

OURS, PAPER = "ours", "paper"


def compare(ours: pd.DataFrame, paper: pd.DataFrame, on: str | Sequence[str]) -> pd.DataFrame:
    """Put two tables side by side on their key columns: each other column becomes "X (ours)" or "X (paper)".

    Rows of one side only stay, with empty cells on the other. Raises ValueError if a key names a row twice.
    """
    keys = [on] if isinstance(on, str) else list(on)
    rows = pd.concat([ours[keys], paper[keys]]).drop_duplicates()  # an outer merge would sort them
    for name, frame in ((OURS, ours), (PAPER, paper)):
        twice = frame[frame.duplicated(keys)]
        if len(twice):
            raise ValueError(f"the {name} table has two rows {twice[keys].iloc[0].to_dict()}: the keys must be unique")
        side = frame.rename(columns={column: f"{column} ({name})" for column in frame.columns.difference(keys)})
        rows = rows.merge(side, on=keys, how="left")
    return rows


def show(value: object, digits: int = 2) -> str:
    """A cell as text: floats to `digits` places without idle zeros, missing values as an en dash."""
    if value is None or value is pd.NA or (np.isscalar(value) and pd.isna(value)):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:.{digits}f}".rstrip("0").rstrip(".") if value != 0 and abs(value) >= 10**-digits else f"{value:.3g}"
    return str(value)


def cells(frame: pd.DataFrame, digits: int = 2) -> list[list[str]]:
    """The rows of a frame as texts by `show`; a column of floats has as many places everywhere as its longest cell needs."""
    columns = []
    for place in range(frame.shape[1]):
        column = frame.iloc[:, place]
        texts = [show(value, digits) for value in column]
        if pd.api.types.is_float_dtype(column):
            plain = (column == 0) | (column.abs() >= 10**-digits)
            places = max((len(text.partition(".")[2]) for text, usual in zip(texts, plain, strict=True) if usual), default=0)
            texts = [f"{v:.{places}f}" if usual else text for v, text, usual in zip(column, texts, plain, strict=True)]
        columns.append(texts)
    return [list(row) for row in zip(*columns, strict=True)]


def to_html(frame: pd.DataFrame, digits: int = 2) -> str:
    """The frame as an HTML table, every cell escaped; cells of numeric columns carry class "n", the paper's class "paper"."""
    kinds = [
        " ".join(["n"] * pd.api.types.is_numeric_dtype(frame.iloc[:, i]) + [PAPER] * str(name).endswith(f"({PAPER})"))
        for i, name in enumerate(frame.columns)
    ]
    attributes = [f' class="{kind}"' if kind else "" for kind in kinds]

    def row(tag: str, texts: Sequence[str]) -> str:
        inner = (f"<{tag}{attribute}>{html.escape(text)}</{tag}>" for attribute, text in zip(attributes, texts, strict=True))
        return "<tr>" + "".join(inner) + "</tr>"

    body = "".join(row("td", texts) for texts in cells(frame, digits))
    head = row("th", [str(name).replace("_", " ") for name in frame.columns])
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
