"""Drawings in Mermaid, whose source the search leaves out."""

from __future__ import annotations

import html
from typing import Any


def fence(source: str, *_: Any, **__: Any) -> str:
    """The block that the theme draws.

    >>> fence("a --> b")
    '<pre class="mermaid" data-search-exclude><code>a --&gt; b</code></pre>'
    """
    return f'<pre class="mermaid" data-search-exclude><code>{html.escape(source)}</code></pre>'
