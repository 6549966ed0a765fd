"""The notebooks whose computation stands in other rooms: figures, explorer and audit."""

from medv.companion.studies.node import Node

NODES = (
    Node(
        "quickstart",
        "00_quickstart.ipynb",
        "Ask a question about an image",
        results=("quickstart",),
        reads=("qa50",),
        needs_model=("models/stage2",),
    ),
    Node(
        "data",
        "01_data.ipynb",
        "The phantoms, and the data sets of the paper",
        results=("phantoms", "table8"),
        may_read=("vqa_rad", "slake", "pathvqa"),
    ),
    Node(
        "corruption",
        "02_corruption_and_loss.ipynb",
        "The corruption process and the loss (Eq. 1-4)",
        results=("corruption", "loss_weights"),
    ),
    Node(
        "explorer",
        "50_explorer.ipynb",
        "The explorer: repetition against sampling steps",
        results=("explorer",),
        reads=("qa50",),
        needs_model=("models/stage2",),
    ),
    Node(
        "report",
        "90_report.ipynb",
        "The report: ours beside the paper's, and an audit of its numbers",
        results=("audit", "audit_gaming"),
        may_read=("vqa_rad", "slake", "pathvqa", "qa50"),
        last=True,
    ),
)
