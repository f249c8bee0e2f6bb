"""The scripts under test: those in tools/, and the runner of planted faults."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tools"), str(ROOT / "tests" / "mutants")]
