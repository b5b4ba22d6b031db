"""The decoder is a folder of plain modules, so that it runs as a script from anywhere."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
