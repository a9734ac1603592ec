"""What a run keeps: metrics.jsonl, TensorBoard events and loss.png survive kills, resumes and full disks."""

import json
import math
import os
import pathlib
import signal
import struct
import subprocess
import sys
import textwrap

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from ml.errors import UserError
from ml.train.reporting import MetricsFile, TensorBoardWriter, plot_loss, read_metrics
from ml.train.reporting.plots import smooth

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _write(path, steps, resume_step=0, offset=0.0):
    with MetricsFile(path, resume_step=resume_step) as file:
        for step in steps:
            file.write(step, {"loss": 1.0 / step + offset, "tokens": 100 * step})


def test_rows_come_back(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write(np.int64(1), {"loss": np.float32(1 / 3), "tokens": np.int32(7), "eval_loss": None, "note": "a\nb"})
        assert path.read_text() == '{"step": 1, "loss": 0.3333333, "tokens": 7, "note": "a\\nb"}\n'  # flushed at once
        file.write(2, {"loss": math.nan, "norm": math.inf, "low": -math.inf, "rate": 1.23456789e-12})
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    rows = read_metrics(path)
    assert rows[0] == {"step": 1, "loss": 0.3333333, "tokens": 7, "note": "a\nb"}
    assert math.isnan(rows[1]["loss"])
    assert (rows[1]["norm"], rows[1]["low"], rows[1]["rate"]) == (math.inf, -math.inf, 1.234568e-12)


def test_resume_drops_the_steps_that_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 11))
    _write(path, range(7, 13), resume_step=6, offset=5.0)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] > 4 for row in rows] == [False] * 6 + [True] * 6
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    _write(path, range(1, 3))
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', b'{"step": 4, "loss": 1}', b"\0\0\0\0", b"\0\0\0\0\n"])
def test_last_line_cut_short_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 4))
    with open(path, "ab") as file:
        file.write(tail)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    _write(path, [4], resume_step=100)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a row of metrics"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"metrics.jsonl:2"):
        MetricsFile(path, resume_step=1)
    assert path.read_text().count("\n") == 3
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


def test_kill_leaves_whole_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = textwrap.dedent(f"""
        from ml.train.reporting import MetricsFile
        file = MetricsFile({str(path)!r})
        for step in range(1, 10**9):
            file.write(step, {{"loss": step, "padding": "x" * 500}})
            if step == 50:
                print("ready", flush=True)
    """)
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 50


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_full_disk_is_a_user_error():
    file = MetricsFile("/dev/full")
    with pytest.raises(UserError, match="disk is full"):
        file.write(1, {"loss": 1.0})


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_row_that_does_not_fit_leaves_no_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = textwrap.dedent(f"""
        import resource
        from ml.errors import UserError
        from ml.train.reporting import MetricsFile
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, 150))  # the third row is taken in part
        file = MetricsFile({str(path)!r})
        try:
            for step in (1, 2, 3):
                file.write(step, {{"padding": "x" * 40}})
        except UserError as error:
            print(error)
    """)
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert "metrics.jsonl: cannot be written" in done.stdout
    assert path.read_text().endswith("}\n")
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def _events(directory):
    """All events of all files, parsed by the TFRecord layout: length, its checksum, payload, its checksum."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    events = []
    for path in sorted(directory.iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            header = data[position : position + 8]
            (length,), (checksum,) = (
                struct.unpack("<Q", header),
                struct.unpack("<I", data[position + 8 : position + 12]),
            )
            assert checksum == masked_crc32c(header)
            payload = data[position + 12 : position + 12 + length]
            assert struct.unpack("<I", data[position + 12 + length : position + 16 + length])[0] == masked_crc32c(
                payload
            )
            events.append(Event.FromString(payload))
            position += 16 + length
    return events


def test_tensorboard_events_and_purge(tmp_path):
    with TensorBoardWriter(tmp_path / "tensorboard") as writer:
        for step in (1, 2, 3):
            writer.write(step, {"train/loss": 0.5 * step, "train/rate": np.float32(0.25)})
    # Two starts within one second must not share a file.
    with TensorBoardWriter(tmp_path / "tensorboard", purge_step=3) as writer:
        writer.write(3, {"train/loss": 9.0})
    assert len(os.listdir(tmp_path / "tensorboard")) == 2
    events = _events(tmp_path / "tensorboard")
    seen = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events if e.HasField("summary")]
    assert seen == [
        (1, {"train/loss": 0.5, "train/rate": 0.25}),
        (2, {"train/loss": 1.0, "train/rate": 0.25}),
        (3, {"train/loss": 1.5, "train/rate": 0.25}),
        (3, {"train/loss": 9.0}),
    ]
    starts = [event for event in events if event.HasField("session_log")]
    assert [(start.step, start.session_log.status) for start in starts] == [(3, 1)]  # 1 is START
    assert events.index(starts[0]) == len(events) - 2


def test_tensorboard_events_reach_the_file_while_the_run_goes_on(tmp_path):
    writer = TensorBoardWriter(tmp_path, flush_seconds=0.0)
    writer.write(1, {"loss": 2.0})
    assert [event.step for event in _events(tmp_path) if event.HasField("summary")] == [1]
    writer.close()


def test_tensorboard_on_an_unusable_path_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        TensorBoardWriter(tmp_path / "file" / "tensorboard")


def _rows(count):
    return [
        {
            "step": step,
            "loss": 2 + 5 * math.exp(-step / 30) + 0.1 * math.sin(9 * step),
            "tokens": 1000,
            "learning_rate": 1e-3 * min(step / 10, 1),
            "gradient_norm": math.nan if step == 5 else 0.5 + 1 / step,
            **({"eval_loss": 2.1 + 5 * math.exp(-step / 30)} if step % 20 == 0 else {}),
        }
        for step in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    "rows",
    [
        _rows(100),
        _rows(3),
        _rows(1),
        [],
        [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}],
        [{"step": 4, "loss": 2.0, "learning_rate": 0.0, "gradient_norm": 0.0, "tokens": 0}],
    ],
    ids=["run", "three", "one", "none", "bare", "zeros"],
)
def test_plot_is_a_picture_whatever_the_rows(tmp_path, rows):
    settings = dict(matplotlib.rcParams)
    plot_loss(rows, tmp_path / "loss.png", title="a run")
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    assert picture.shape == (960, 1440, 4)
    assert picture.min() < 0.5
    assert os.listdir(tmp_path) == ["loss.png"]
    assert dict(matplotlib.rcParams) == settings


def _figure(rows, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    plot_loss(rows, tmp_path / "loss.png")
    return figures[0]


def test_plot_shows_every_series_with_units(tmp_path, monkeypatch):
    figure = _figure(_rows(100), tmp_path, monkeypatch)
    loss, lower, right = figure.axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        "training, each step",
        "training, smoothed",
        "held-out",
    ]
    assert loss.get_ylabel() == "loss (nats per token)"
    assert (lower.get_xlabel(), lower.get_ylabel(), right.get_ylabel()) == ("step", "learning rate", "gradient norm")
    assert list(loss.lines[2].get_xdata()) == [20, 40, 60, 80, 100]
    top = loss.child_axes[0]
    assert top.get_xlabel() == "training tokens"
    ticks = {label.get_text(): tick for label, tick in zip(top.get_xticklabels(), top.get_xticks(), strict=True)}
    assert ticks["20k"] == pytest.approx(20) and ticks["100k"] == pytest.approx(100)


def test_plot_of_images_counts_images(tmp_path, monkeypatch):
    rows = [row | {"images": row.pop("tokens"), "images_seen": 1000 * row["step"]} for row in _rows(40)]
    loss = _figure(rows, tmp_path, monkeypatch).axes[0]
    assert loss.get_ylabel() == "loss (nats per image)"
    assert loss.child_axes[0].get_xlabel() == "training images"


def test_one_spike_neither_flattens_nor_lifts_the_curve(tmp_path, monkeypatch):
    rows = _rows(300)
    rows[150]["loss"] = 1e4
    loss = _figure(rows, tmp_path, monkeypatch).axes[0]
    assert loss.get_ylim()[1] < 10
    assert max(loss.lines[1].get_ydata()) < 8


def test_smoothing_keeps_a_straight_line_and_the_ends():
    line = np.arange(20.0)
    np.testing.assert_allclose(smooth(line, 7), line)
    np.testing.assert_allclose(
        smooth(np.eye(1, 9, 4)[0], 3), np.where(abs(np.arange(9) - 4) <= 1, 1 / 3, 0), atol=1e-12
    )


def test_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    plot_loss(_rows(2), tmp_path / "loss.png")
    before = (tmp_path / "loss.png").read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        plot_loss(_rows(50), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["loss.png"]
