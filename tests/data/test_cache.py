"""A cached folder is whole or absent: through kills, full disks, damage and races."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
import threading
import time

import pytest

from ml.data.cache import build_once
from ml.errors import UserError


def _build(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "data.bin").write_bytes(b"0123456789")


def _left(parent):
    return sorted(path.name for path in parent.iterdir() if not path.name.endswith(".lock"))


def test_builds_once_and_reuses(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        _build(folder)

    for _ in range(3):
        assert build_once(tmp_path / "deep" / "x", build) == tmp_path / "deep" / "x"
    assert len(calls) == 1
    assert _left(tmp_path / "deep") == ["x"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "no manifest"])
def test_damage_is_found_and_mended(tmp_path, damage, caplog):
    target = build_once(tmp_path / "x", _build)
    data = target / "sub" / "data.bin"
    if damage == "truncate":
        data.write_bytes(b"01234")
    elif damage == "remove":
        data.unlink()
    elif damage == "manifest":
        (target / "manifest.json").write_text('{"sub/da')
    else:
        (target / "manifest.json").unlink()
    build_once(target, _build)
    assert data.read_bytes() == b"0123456789"
    assert "damaged" in caplog.text


def test_failure_leaves_nothing(tmp_path):
    def fail(folder):
        _build(folder)
        raise UserError("malformed")

    with pytest.raises(UserError, match="malformed"):
        build_once(tmp_path / "x", fail)
    assert _left(tmp_path) == []


def test_kill_in_the_middle_leaves_nothing_that_is_taken_for_whole(tmp_path):
    code = (
        "import os, signal, sys, pathlib\n"
        "from ml.data.cache import build_once\n"
        "def build(folder):\n"
        "    (folder / 'half').write_bytes(b'01234')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "build_once(pathlib.Path(sys.argv[1]), build)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], env=environment)
    assert result.returncode == -9
    (partial,) = _left(tmp_path)
    assert partial.startswith("x.partial-")
    target = build_once(tmp_path / "x", _build)
    assert _left(tmp_path) == ["x"], "the dead writer's leftovers are removed"
    assert _left(target) == ["manifest.json", "sub"]


def test_disk_full_is_one_line_and_leaves_nothing(tmp_path):
    # A limit on file size makes the system refuse the write itself, as a full disk would.
    def build(folder):
        with open(folder / "large.bin", "wb") as file:
            file.write(bytes(2**22))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(UserError, match=r"disk full while preparing data: free space .* data\.cache_dir") as caught:
            build_once(tmp_path / "x", build)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value.__cause__, OSError)
    assert _left(tmp_path) == []


def test_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot be written .*data\.cache_dir"):
        build_once(tmp_path / "file" / "x", _build)


def test_of_many_at_once_one_builds(tmp_path):
    calls = []
    gate = threading.Barrier(4)

    def build(folder):
        calls.append(folder)
        time.sleep(0.05)
        _build(folder)

    def run():
        gate.wait()
        build_once(tmp_path / "x", build)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert _left(tmp_path) == ["x"]


def test_without_locks_the_first_to_finish_is_kept(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    other = build_once(tmp_path / "other", _build)

    def build(folder):
        _build(folder)
        if not (tmp_path / "x").exists():
            other.rename(tmp_path / "x")  # meanwhile, another process finished

    build_once(tmp_path / "x", build)
    assert _left(tmp_path) == ["x"]
    assert (tmp_path / "x" / "sub" / "data.bin").read_bytes() == b"0123456789"
