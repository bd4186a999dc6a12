"""The repository's root on the path: the tiny world is run with `python -m playground.tiny...` and is in no wheel."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
