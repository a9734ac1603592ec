"""How every picture looks and is written: colours, axes, and a PNG that is whole or not there."""

import io
import os
import pathlib
from typing import Any

INK, GREY, GRID = "#222222", "#666666", "#e6e6e6"
BLUE, ORANGE, GREEN, RED = "#1f5fa8", "#e07b00", "#2a8a57", "#b5403f"


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of this size in inches."""
    # Not pyplot: it keeps global state, and chooses a backend that may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


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
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(picture.getvalue())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
