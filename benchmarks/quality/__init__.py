"""Do the papers' claims hold? Methods trained on real tasks at matched budgets, with seeds; see README.md here."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2] / "examples"))  # the model and the data
