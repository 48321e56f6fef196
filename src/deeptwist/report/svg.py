"""A matplotlib figure as SVG inside a page: light, without foreign addresses, safe to repeat."""

import io
import re
import warnings
from collections.abc import Callable
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deeptwist.report.styles import GRID, INK, MUTED, VARIABLES

WIDTH = 5.3
_NAMESPACE = re.compile(r"^\{[^}]*\}")
_REFERENCE = re.compile(r"(?:url\()?#([\w-]+)\)?")
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a run may be called "$x$"
    "font.size": 10.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
}


def render(paint: Callable[[Axes], None], *, name: str, label: str, height: float = 3.0) -> Markup:
    """Draws an ``<svg>`` element.

    Args:
        paint: draws on empty axes, in the page's style.
        name: unlike that of any other drawing on the page; ids begin with it.
        label: what is read out in the drawing's place.
        height: in inches; every drawing is `WIDTH` wide.
    """
    buffer = io.StringIO()
    with style.context(["default", _STYLE, {"svg.hashsalt": name}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser's fonts have it
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    _strip(root)
    _rename_ids(root, name)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _strip(root: ElementTree.Element) -> None:
    """Takes out what only a file of its own needs: metadata, namespaces, style sheet, fonts."""
    for element in root.iter():
        for child in list(element):
            if _NAMESPACE.sub("", child.tag) in ("metadata", "style"):
                element.remove(child)
        element.tag = _NAMESPACE.sub("", element.tag)
        element.attrib = {_NAMESPACE.sub("", k): _plain(v) for k, v in element.attrib.items()}
        element.text = (element.text or "").strip() or None
        element.tail = (element.tail or "").strip() or None


def _plain(value: str) -> str:
    """An attribute in the page's colours, without fonts, line breaks and digits nobody sees."""
    for color, variable in VARIABLES.items():
        value = value.replace(color, variable)
    value = re.sub(r"font-family: [^;]*; ", "", value)
    value = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", value)
    return " ".join(value.split())


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Keeps the ids that are referred to, under names of their own."""
    used: set[str] = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if found := _REFERENCE.fullmatch(value):
                used.add(found[1])
                element.set(key, value.replace("#", f"#{name}-"))
    for element in root.iter():
        if "id" in element.attrib:
            identifier = element.attrib.pop("id")
            if identifier in used:
                element.set("id", f"{name}-{identifier}")
