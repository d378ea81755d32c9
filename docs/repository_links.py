"""A MkDocs hook: links from a page to files of the repository outside ``docs/``.

They work where the repository is browsed. On the site they lead to the file at ``repo_url`` if mkdocs.yml has one, and
are plain text otherwise. A file that does not exist is left to MkDocs, whose strict mode then stops the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<path>\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of one page."""
    del files
    docs = Path(config.docs_dir).resolve()
    folder = (docs / page.file.src_uri).parent

    def rewritten(link: re.Match[str]) -> str:
        target = (folder / link["path"]).resolve()
        if target.is_relative_to(docs) or not target.is_relative_to(docs.parent) or not target.exists():
            return link[0]
        if not config.repo_url:
            return link["text"]
        kind = "tree" if target.is_dir() else "blob"
        return f"[{link['text']}]({config.repo_url.rstrip('/')}/{kind}/main/{target.relative_to(docs.parent)})"

    return _LINK.sub(rewritten, markdown)
