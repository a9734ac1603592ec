"""``kill -9`` at random moments: what can be restored afterwards is complete and is what was saved."""

import pathlib
import subprocess
import sys

KILLS = 15


def test_a_killed_run_never_leaves_a_checkpoint_that_is_not_whole(tmp_path):
    program = pathlib.Path(__file__).with_name("killed_saver.py")
    command = [sys.executable, str(program), str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = dict(line.split("=") for line in done.stdout.split())
    assert int(report["kills"]) == KILLS
    # This means something only if saves were cut off, and if some were completed in between.
    assert int(report["cut_off"]) >= KILLS // 4 and int(report["steps"]) >= KILLS // 4, report
