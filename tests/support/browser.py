"""A real browser without a window: Debian's Chromium, or Chrome where that is installed."""

from __future__ import annotations

import html
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image

from tests.support.programs import missing, run

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Shown:
    """What a page has become once its scripts have run."""

    text: str  # the elements as HTML
    console: list[str]  # everything that the browser has complained about
    picture: Path

    def figures(self) -> dict[str, str]:
        """Key figures by name."""
        found = re.findall(r'<dd data-key="(\w+)">(.*?)</dd>', self.text)
        return {key: html.unescape(value) for key, value in found}

    def headings(self) -> list[str]:
        return [html.unescape(title) for title in re.findall(r"<h2[^>]*>(.*?)</h2>", self.text)]

    def colour(self) -> tuple[int, int, int]:
        """Of the paper, in its upper left corner."""
        red, green, blue = matplotlib.image.imread(self.picture)[2, 2, :3]
        return round(255 * float(red)), round(255 * float(green)), round(255 * float(blue))


def shown(address: str, folder: Path, dark: bool = False, width: int = 1280) -> Shown:
    """Open a page, wait until it is drawn, and take it down; skips the test, or fails it in CI, without a browser."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        missing("no browser is installed: apt-get install chromium")
        raise AssertionError
    picture = folder / "page.png"
    # Helpers of the browser that end a moment after it may still write there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        found = run(
            program,
            *(
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--enable-logging=stderr",
            ),
            *(f"--user-data-dir={profile}", "--virtual-time-budget=3000", f"--window-size={width},1400"),
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            *(f"--screenshot={picture}", "--dump-dom", address),
            limit_s=90,
        )
    console = [line for line in found.stderr.splitlines() if ":CONSOLE" in line or "Uncaught" in line]
    return Shown(found.stdout, console, picture)
