"""Pages of the reference, made from the code: uri -> Markdown."""

from __future__ import annotations

import pathlib

from manual import commands, exported, messages, recipes, serving


def pages(root: pathlib.Path) -> dict[str, str]:
    """All of them."""
    return {
        **exported.pages(root),
        "reference/commands.md": commands.page(),
        "reference/recipes.md": recipes.page(),
        "reference/http.md": serving.routes_page(),
        "reference/limits.md": serving.limits_page(),
        "reference/metrics.md": serving.metrics_page(),
        "reference/messages.md": messages.page(root),
    }
