"""What a shell may complete besides commands, options and files: run folders, and keys of the configuration."""

from __future__ import annotations

from glob import escape, glob
from pathlib import Path

from scpl_dist.run import config


def run_folders(incomplete: str) -> list[str]:
    """Those whose path begins so, down to one folder below, such as ``runs/latest``."""
    begin = escape(incomplete)
    return sorted(
        str(Path(found).parent) for part in ("", "*/") for found in glob(f"{begin}*/{part}config.toml")
    )


def keys(incomplete: str) -> list[tuple[str, str]]:
    """Those that begin so, ready for a value, with what they mean."""
    names = [name for name in config.effects() if "." in name and name.startswith(incomplete)]
    return [(f"{name}=", _meaning(name)) for name in names]


def _meaning(name: str) -> str:
    section, _, key = name.partition(".")
    return " ".join((config.keys_of(section)[key].description or "").split())
