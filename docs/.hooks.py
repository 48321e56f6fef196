"""What the site needs of pages that are written to be read in the repository."""

import re
from pathlib import Path
from typing import Any

_AT_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Read pages of the root; leave the words of links to files that the site does not hold."""
    name = page.file.src_uri
    if name in _AT_ROOT:
        markdown = Path(_AT_ROOT[name]).read_text(encoding="utf-8")
        for page_name, file in _AT_ROOT.items():
            markdown = markdown.replace(f"]({file})", f"]({page_name})")
        markdown = markdown.replace("](docs/", "](")
    markdown = re.sub(r"!\[([^\]]*)\]\(\.\./([^)]*)\)", r"*\1: \2 in the repository*", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
