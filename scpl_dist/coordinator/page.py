"""The files of the page that shows a run: the coordinator serves them, and a report has them inside."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

# What the live page is made of, by path; nothing else of the package can be asked for.
LIVE = {
    "/": ("live.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/live.js": ("live.js", "text/javascript"),
}
POLICY = (
    "default-src 'none'; img-src data:; style-src 'self'; script-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@cache
def asset(name: str) -> str:
    return (files("scpl_dist") / "page" / name).read_text(encoding="utf-8")
