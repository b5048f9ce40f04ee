"""The committed checkpoints."""

from __future__ import annotations

from pathlib import Path

from tests.structure.tree import ROOT

CHECKPOINTS: Path = ROOT / "bench" / "fidelity" / "checkpoints"
FOLDERS = sorted(path.parent.name for path in CHECKPOINTS.glob("*/metrics.json"))
