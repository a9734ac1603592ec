"""`ml/studies/plot.py`: a picture with a panel for each."""

import matplotlib.image
from outcome_cases import outcome

from ml.studies.outcome import Panel, Series
from ml.studies.plot import plot_outcome


def test_a_picture_has_its_panels_side_by_side(tmp_path):
    points = Series("points", (1.0, 2.0), (3.0, 40.0), marks_only=True)
    panels = tuple(Panel("x", "y", (points,), title=str(i), y_log=True, x_log=True) for i in range(2))
    for count in (1, 2):
        plot_outcome(outcome(panels=panels[:count]), tmp_path / "new" / f"{count}.png")
    widths = [matplotlib.image.imread(tmp_path / "new" / f"{count}.png").shape[1] for count in (1, 2)]
    assert widths[1] == 2 * widths[0]
    assert len(list((tmp_path / "new").iterdir())) == 2, "nothing else is left"
