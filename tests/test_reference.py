"""medv computes what the reference computes: every case that the folder of its outputs holds, none named here.

The folder is MEDV_FIXTURES (default: ../shared/fixtures beside the repository). The tests stand in three files by what they
look at: text (forward, loss, sampling, prompts, labels), images (views, visual tokens, merged features) and weights.
"""

import pytest
from reference import FOLDER
from reference_images import *  # noqa: F403
from reference_text import *  # noqa: F403
from reference_weights import *  # noqa: F403

pytestmark = pytest.mark.skipif(
    not (FOLDER / "config.json").is_file(), reason=f"outputs of the reference are not at {FOLDER}: set MEDV_FIXTURES"
)
