"""What the site needs of pages that are written to be read in the repository."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import deeptwist
from deeptwist.app.cli.commands import app
from deeptwist.app.cli.console import default_of

_AT_ROOT = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_NOTEBOOK = "notebooks/resnet18"
_FIGURE = re.compile(r"(!\[[^\]]*\])\(\.\./(results/[^)]*)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the figures of results that pages show, the notebook and all options as pages."""
    docs = Path(config.docs_dir)
    pages = "".join(page.read_text(encoding="utf-8") for page in docs.glob("*.md"))
    for path in dict.fromkeys(path for _, path in _FIGURE.findall(pages)):
        files.append(File.generated(config, path, abs_src_path=str(docs.parent / path)))
    cells = json.loads((docs / f"{_NOTEBOOK}.ipynb").read_text(encoding="utf-8"))["cells"]
    page = "\n\n".join(_as_markdown(cell) for cell in cells)
    files.append(File.generated(config, f"{_NOTEBOOK}.md", content=page))
    for name, file in _AT_ROOT.items():
        files.append(File.generated(config, name, content=Path(file).read_text(encoding="utf-8")))
    files.append(File.generated(config, "options.md", content=_options()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Lead the root's links to the site's pages; of those that lead out of it, leave the words."""
    if page.file.src_uri in _AT_ROOT:
        for page_name, file in _AT_ROOT.items():
            markdown = markdown.replace(f"]({file})", f"]({page_name})")
        markdown = markdown.replace("](docs/", "](")
    markdown = _FIGURE.sub(r"\1(\2)", markdown).replace(f"{_NOTEBOOK}.ipynb", f"{_NOTEBOOK}.md")
    markdown = re.sub(r"^::: (.+)$", _as_imported, markdown, flags=re.M)
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)


def _as_markdown(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    printed = "".join("".join(output.get("text", "")) for output in cell["outputs"]).rstrip()
    return f"```python\n{text}\n```" + (f"\n\n```text\n{printed}\n```" if printed else "")


def _options() -> str:
    """Return a table for each command: its options, their defaults, what they say."""
    lines = ["# All options"]
    for name in (name for name in app if not name.startswith("-")):
        lines += [f"\n## deeptwist {name}\n", "| option | default | |", "| --- | --- | --- |"]
        command = app[name]
        with command.app_stack([app, command]):
            arguments = command.assemble_argument_collection(parse_docstring=True)
        defaults = getattr(command.help_formatter, "defaults", {})
        for argument in (each for each in arguments if each.show):
            names = " ".join(f"`{name}`" for name in dict.fromkeys(argument.names))
            own = argument.field_info.default
            default = default_of(argument.names, own, defaults) if argument.show_default else None
            choices = f" ({', '.join(map(str, argument.get_choices() or ()))})".replace(" ()", "")
            says = " ".join((argument.parameter.help or "").split())
            lines.append(f"| {names} | {default or ''} | {says}{choices} |")
    return "\n".join(lines)


def _as_imported(match: re.Match[str]) -> str:
    """Head each name of a line as it is written: `dt.NAME`, wherever that lives, or a path."""
    blocks = []
    for name in match[1].split():
        value = getattr(deeptwist, name[3:]) if name.startswith("dt.") else None
        path = f"{value.__module__}.{value.__qualname__}" if value else name
        heading = f"    options:\n      heading: {name}\n      toc_label: {name}"
        blocks.append(f"::: {path}\n{heading}")
    return "\n\n".join(blocks)
