"""What a run shows: progress on a terminal and in a log, and the closing report."""

import gzip
import io
import lzma
import random
import re
import subprocess
import sys

import pytest
from rich.console import Console

from ml.train.reporting import (
    ProgressDisplay,
    Report,
    gzip_bits_per_byte,
    print_report,
    xz_bits_per_byte,
)
from ml.train.reporting.progress import duration, short_number


class _Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def _run(steps, seconds, terminal=False, **kwargs):
    """Lines that a run of ``steps`` steps, each ``seconds`` long and of 1000 tokens, writes."""
    stream, clock = io.StringIO(), _Clock()
    with ProgressDisplay(steps, stream=stream, terminal=terminal, clock=clock, **kwargs) as display:
        for step in range(1 + kwargs.get("first_step", 0), steps + 1):
            clock.now += seconds
            display.update(step, loss=10.0 / step, tokens=1000)
    return stream.getvalue(), display


def test_log_has_a_line_every_five_seconds_with_first_and_last():
    text, display = _run(1001, 0.05)
    lines = text.splitlines()
    assert lines[0].startswith("step 1/1,001  loss 10.0000")
    assert lines[-1].startswith("step 1,001/1,001")
    assert len(lines) == 11  # 50 seconds
    assert "\x1b" not in text
    assert display.tokens_per_second == pytest.approx(20_000)


def test_line_tells_speed_utilization_and_time_left():
    text, _ = _run(400, 1.0, peak_flops=1e9, flops_per_token=250_000.0)
    line = next(line for line in text.splitlines() if line.startswith("step 101/"))
    assert line == "step 101/400  loss 0.0990  1.00k tokens/s  MFU 25.0%  4:59 left"
    unknown, _ = _run(20, 1.0, flops_per_token=250_000.0)
    assert "MFU" not in unknown


def test_each_step_of_a_slow_run_is_shown_once():
    text, _ = _run(3, 60.0)
    assert [line.split()[1] for line in text.splitlines()] == ["1/3", "2/3", "3/3"]


def test_speed_leaves_out_compilation_and_pauses_and_follows_change():
    clock = _Clock()
    display = ProgressDisplay(10**6, stream=io.StringIO(), terminal=False, clock=clock)
    step = 0

    def advance(count, seconds):
        nonlocal step
        for _ in range(count):
            step += 1
            clock.now += seconds
            display.update(step, loss=1.0, tokens=1000)

    advance(1, 300.0)
    assert display.tokens_per_second is None
    advance(5, 0.5)
    assert display.tokens_per_second == pytest.approx(2000)
    clock.now += 500
    display.pause()
    clock.now += 500
    advance(1, 0.5)
    assert display.tokens_per_second == pytest.approx(2000)
    advance(50, 0.5)
    assert display.tokens_per_second == pytest.approx(2000)
    advance(100, 0.25)
    assert display.tokens_per_second == pytest.approx(4000)


def test_resumed_run_starts_where_it_stopped():
    text, display = _run(20, 1.0, first_step=10)
    assert text.startswith("step 11/20")
    assert display.tokens_per_second == pytest.approx(1000)


def test_terminal_draws_a_bar_at_most_four_times_a_second():
    text, _ = _run(400, 0.01, terminal=True)
    drawn = re.findall(r"step [\d,]+/400", text)
    assert drawn[-1] == "step 400/400"
    assert 10 <= len(drawn) <= 25
    assert "━" in text
    assert text.endswith("\n\x1b[?25h")  # on a line of its own, the cursor visible again


@pytest.mark.parametrize("terminal", [True, False])
def test_messages_stand_on_their_own_lines(terminal):
    stream = io.StringIO()
    with ProgressDisplay(10, stream=stream, terminal=terminal) as display:
        display.update(1, loss=1.0, tokens=1)
        display.log("saved [step 1] to checkpoints/1")
        display.update(2, loss=1.0, tokens=1)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "saved [step 1] to checkpoints/1" in [line.strip() for line in re.split(r"[\r\n]+", plain)]


def test_closed_log_does_not_end_the_run():
    stream = io.StringIO()
    with ProgressDisplay(2, stream=stream, terminal=False) as display:
        stream.close()
        display.update(1, loss=1.0, tokens=1)
        display.log("still here")


def test_progress_goes_to_stderr_only():
    program = (
        "from ml.train.reporting import ProgressDisplay\n"
        "with ProgressDisplay(1) as display:\n"
        "    display.update(1, loss=1.0, tokens=1)\n"
        "    display.log('message')\n"
        "    print('result')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "result\n"
    assert "step 1/1" in done.stderr and "message" in done.stderr


def test_numbers_and_durations_read_well():
    numbers = [0, 7.25, 999.4, 999.6, 1234, 12_345, 999_999, 4.2e6, 8.03e9, 1.5e13]
    assert [short_number(n) for n in numbers] == [
        "0.00", "7.25", "999", "1.00k", "1.23k", "12.3k", "1.00M", "4.20M", "8.03B", "15.0T",
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 59.4, 59.6, 187, 7387, 200_000)] == [
        "0 s", "59 s", "1:00", "3:07", "2:03:07", "2 d 7 h",
    ]  # fmt: skip


def test_compressors_see_the_whole_text_at_once():
    words = random.Random(0).choices([f"name_{i} = {i * i}\n".encode() for i in range(300)], k=4000)
    texts = [b"".join(words[:2000]), b"".join(words[2000:])]
    whole = b"".join(texts)
    assert gzip_bits_per_byte(iter(texts)) == 8 * len(gzip.compress(whole, 9)) / len(whole)
    assert len(lzma.compress(whole, preset=9)) < len(lzma.compress(whole, preset=0))
    assert xz_bits_per_byte(iter(texts)) == 8 * len(lzma.compress(whole, preset=9)) / len(whole)
    with pytest.raises(ValueError, match="no text"):
        gzip_bits_per_byte([])


_REPORT = Report(
    bits_per_byte=1.75,
    gzip_bits_per_byte=2.0,
    xz_bits_per_byte=1.5,
    heldout_bytes=1_234_567,
    steps=400,
    tokens=13_100_000,
    tokens_per_second=65_432.1,
    seconds=200.0,
    parameters=4_200_000,
    device="CPU",
    files={"checkpoint": "/runs/" + "long/" * 30 + "400", "metrics": "/runs/metrics.jsonl"},
    sample="def [bold]main[/bold]():\n    pass\n",
)


def _print(report):
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=80, force_terminal=False))
    return stream.getvalue()


def test_report_tells_all_and_honestly():
    text = _print(_REPORT)
    assert "1.23 MB of held-out text" in text
    lines = [line.rstrip() for line in text.splitlines()]
    ranked = [line.split()[0] for line in lines if "█" in line]
    assert ranked == ["xz", "this", "gzip"]  # the best first, whoever it is
    assert any(line.startswith("xz -9") and "1.500" in line and "16.7% more" in line for line in lines)
    assert any(line.startswith("gzip -9") and "2.000" in line and "12.5% less" in line for line in lines)
    for part in ("400 steps, 13.1M tokens in 3:20", "65.4k tokens/s", "4.20M parameters", "CPU"):
        assert part in text
    assert "def [bold]main[/bold]():" in lines
    assert "peak" not in text
    for label, path in _REPORT.files.items():  # a path stays on one line, whole
        assert any(line.split() == [label, path] for line in lines)


def test_report_without_evaluation():
    bare = Report(None, None, None, 0, 1, 10, 5.0, 2.0, 100, "CPU", flops_utilization=0.413)
    text = _print(bare)
    assert "bits per byte" not in text
    assert "41.3% of the device's peak" in text
