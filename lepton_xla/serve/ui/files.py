"""The files of the page, and the header fields that keep it to itself."""

from __future__ import annotations

from importlib import resources

HEADERS = (
    (
        "Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options: nosniff",
    "Referrer-Policy: no-referrer",
    "Cache-Control: no-cache",
)
"""Header fields of every file: nothing is loaded from elsewhere, and no other page may frame this one."""

_FILES = {
    "page": ("index.html", "text/html; charset=utf-8"),
    "page_script": ("ui.js", "text/javascript; charset=utf-8"),
    "page_figures": ("figures.js", "text/javascript; charset=utf-8"),
    "page_drawing": ("drawing.js", "text/javascript; charset=utf-8"),
    "page_explain": ("explain.js", "text/javascript; charset=utf-8"),
    "page_traffic": ("traffic.js", "text/javascript; charset=utf-8"),
    "page_style": ("ui.css", "text/css; charset=utf-8"),
}


def page_files() -> dict[str, tuple[bytes, str]]:
    """Route -> content and type of a file.

    >>> page_files()["page"][0].startswith(b"<!doctype html>")
    True
    """
    folder = resources.files(__package__)
    return {route: ((folder / name).read_bytes(), content_type) for route, (name, content_type) in _FILES.items()}
