"""The published annotations: under MEDV_SHARED (default: ../shared beside the repository), or their tests are skipped."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MEDV_SHARED", Path(__file__).parents[1] / "../shared")) / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the published files are not at {DATA} (set MEDV_SHARED)")
