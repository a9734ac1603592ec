"""How every picture looks and is written: colours, axes, an SVG for a page, a file that is whole or not there."""

import io
import os
import pathlib
import re
from typing import Any

INK, GREY, GRID = "#222222", "#666666", "#e6e6e6"
BLUE, ORANGE, GREEN, RED = "#1f5fa8", "#e07b00", "#2a8a57", "#b5403f"
PALETTE = (BLUE, ORANGE, GREEN, RED, "#7a5195", "#1a8f9a", "#8c6d31", "#c2548f")
"""Of lines side by side, in this order."""

THEMED = {
    INK: "ink",
    GREY: "grey",
    GRID: "grid",
    "#ffffff": "paper",
    **dict(zip(PALETTE, ("blue", "orange", "green", "red", "purple", "teal", "brown", "pink"), strict=True)),
}
"""Colours that a page may change for a dark screen: in `to_svg` they are the CSS variables of these names."""

_LIGHT = {"paper": "#ffffff", "card": "#ffffff", "edge": "#e3e5e8", "ink": "#1d2126", "grey": "#68707a"}
_LIGHT |= {"grid": "#eaecef", "blue": "#1f5fa8", "orange": "#d06f00", "green": "#2a8a57", "red": "#b5403f"}
_LIGHT |= {"purple": "#7a5195", "teal": "#1a8f9a", "brown": "#8c6d31", "pink": "#c2548f"}
_DARK = {"paper": "#14171b", "card": "#1b1f24", "edge": "#2c3239", "ink": "#e4e7eb", "grey": "#98a1ac"}
_DARK |= {"grid": "#2a2f36", "blue": "#6aa7ee", "orange": "#f0a04b", "green": "#5fc08d", "red": "#e57f7d"}
_DARK |= {"purple": "#b795d6", "teal": "#57c3cd", "brown": "#cdaf70", "pink": "#e693bf"}
FONTS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'


def colour_variables() -> str:
    """The CSS that gives the variables of `THEMED`, and a page's own, their colours on light and on dark screens."""
    light, dark = (" ".join(f"--{name}: {value};" for name, value in table.items()) for table in (_LIGHT, _DARK))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def new_figure(width: float, height: float, *, room: tuple[float, float, float, float] | None = None) -> Any:
    """A matplotlib figure.

    Args:
      width, height: in inches.
      room: inches left for what stands around the axes: left, right, top, bottom; ``None``: as much as it needs, which
        takes three drawings to find out.
    """
    # Not pyplot: it keeps global state, and chooses a backend that may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout: Any = "constrained" if room is None else "none"
    figure = Figure(figsize=(width, height), dpi=150, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    if room is not None:
        left, right, top, bottom = room
        figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure


def to_svg(figure: Any, name: str) -> str:
    """The figure as an ``<svg>`` to stand in a page, as wide as its place, in the page's letters and colours.

    Args:
      figure: of `new_figure`.
      name: unlike that of any other figure of the page: the ids in it are made from it, so they do not clash.
    """
    import matplotlib

    figure.patch.set_visible(False)
    picture = io.StringIO()
    # Text stays text: a page can be searched, and needs no outlines of letters.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    text = picture.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in THEMED.items():
        text = text.replace(f": {colour}", f": var(--{variable})")
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)


def to_image(figure: Any, name: str) -> str:
    """The figure as an SVG file that stands alone, with a background, on light and on dark screens."""
    css = f"<style>{colour_variables()}\ntext {{ font-family: {FONTS} !important; }}</style>"
    paper = '<rect width="100%" height="100%" rx="6" fill="var(--paper)"/>'
    return re.sub(r"(<svg [^>]*>)", lambda match: f"{match[1]}{css}{paper}", to_svg(figure, name), count=1)


def style(axes: Any) -> None:
    """A light grid behind the data and no frame but the line below."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=11, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GREY)


def write_png(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes the picture atomically; parent directories must exist.

    Raises:
      OSError: the file cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all; parent directories must exist.

    Raises:
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
