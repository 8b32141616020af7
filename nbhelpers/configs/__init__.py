"""Configuration files, and what they are called; imports nothing heavy."""

from pathlib import Path

CONFIGS = Path(__file__).resolve().parent


def experiments() -> list[str]:
    """Names of the experiments under ``configs/experiment``."""
    return sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
