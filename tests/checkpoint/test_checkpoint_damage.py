"""Damaged, truncated and unfinished checkpoints, and disks that are full: noticed, named, survived."""

import errno
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.checkpoint import CheckpointConfig, Checkpointer, directory, manifest, orbax_io
from ml.errors import UserError

CONFIG = CheckpointConfig(every=1, keep=3)


def state_of(step):
    return {"params": {"w": jnp.asarray(np.random.default_rng(step).normal(size=(64, 8)), jnp.float32)}}


def save(workdir, *steps):
    with Checkpointer(workdir, CONFIG) as checkpointer:
        for step in steps:
            checkpointer.save(step, state_of(step), {"step": step})


def files(checkpoint: pathlib.Path):
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


def flip(path: pathlib.Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 1, 2)
    return workdir


@pytest.mark.parametrize("damage", [flip, truncate, pathlib.Path.unlink])
def test_any_damage_to_any_file_is_noticed_and_an_older_one_taken(saved, tmp_path, damage, caplog):
    names = [name for name in files(saved / "checkpoints/2") if (saved / "checkpoints/2" / name).stat().st_size]
    assert any("/d/" in name for name in names) and "manifest.json" in names
    for name in names:
        workdir = tmp_path / name.replace("/", "-")
        shutil.copytree(saved, workdir)
        damage(workdir / "checkpoints/2" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING), Checkpointer(workdir, CONFIG) as checkpointer:
            assert checkpointer.latest_step() == 2
            restored = checkpointer.restore(state_of(0))
            assert restored.step == 1 and restored.data_state == {"step": 1}
            assert checkpointer.latest_step() == 1
        np.testing.assert_array_equal(restored.state["params"]["w"], state_of(1)["params"]["w"])
        assert name in caplog.text and "checkpoints/2 is not whole" in caplog.text
        assert (workdir / "checkpoints/2.damaged").is_dir()


def test_damage_is_noticed_by_checksum_alone_and_only_if_asked_for(saved, tmp_path):
    """Without the manifest's checksums a flipped bit in the data would be restored silently: that is why they exist."""
    shutil.copytree(saved, tmp_path / "run")
    for checkpoint in (tmp_path / "run/checkpoints").glob("[0-9]"):
        largest = max((checkpoint / name for name in files(checkpoint)), key=lambda path: path.stat().st_size)
        flip(largest)
    with Checkpointer(tmp_path / "run", CheckpointConfig(verify=False)) as checkpointer:
        assert checkpointer.restore(state_of(0)).step == 2
        shutil.copytree(saved / "checkpoints/2", tmp_path / "run/checkpoints/3")
        truncate(tmp_path / "run/checkpoints/3/state/_METADATA")
        assert checkpointer.restore(state_of(0)).step == 2  # sizes are compared all the same
    with (
        Checkpointer(tmp_path / "run") as checkpointer,
        pytest.raises(UserError, match=r"no whole checkpoint \(2: .*checksum.*; 1: .*checksum"),
    ):
        checkpointer.restore(state_of(0))


def test_an_explicit_step_that_is_damaged_is_refused_and_left_in_place(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    flip(tmp_path / "run/checkpoints/2/state/manifest.ocdbt")
    with (
        Checkpointer(tmp_path / "run") as checkpointer,
        pytest.raises(UserError, match=r"damaged.*restore another: 1$"),
    ):
        checkpointer.restore(state_of(0), step=2)
    assert (tmp_path / "run/checkpoints/2").is_dir()


def test_training_goes_on_over_a_damaged_step(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    flip(tmp_path / "run/checkpoints/2/manifest.json")
    with Checkpointer(tmp_path / "run", CONFIG) as checkpointer:
        assert checkpointer.restore(state_of(0)).step == 1
        checkpointer.save(2, state_of(22), None)
        assert checkpointer.restore(state_of(0)).step == 2
        np.testing.assert_array_equal(
            checkpointer.restore(state_of(0)).state["params"]["w"], state_of(22)["params"]["w"]
        )


def test_what_an_interruption_leaves_is_never_taken_and_is_cleaned_up(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    shutil.copytree(folder / "2", folder / "3")  # cut off between Orbax's end and ours
    (folder / "3/manifest.json").unlink()
    (folder / "3.unfinished").touch()
    shutil.copytree(folder / "2", folder / "4.orbax-checkpoint-tmp-123")  # cut off within Orbax
    (folder / "4.unfinished").touch()
    (folder / "2.unfinished").touch()  # cut off between becoming whole and losing the mark
    (folder / "notes").mkdir()  # somebody else's
    with Checkpointer(tmp_path / "run", CONFIG) as checkpointer:
        assert {path.name for path in folder.iterdir()} == {"1", "2", ".lock", "notes"}
        assert checkpointer.restore(state_of(0)).step == 2


def test_a_save_under_way_counts_only_once_it_is_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)
    seen = {}
    start_save, write = orbax_io.start_save, manifest.write

    class Watched:
        def __init__(self, path, arrays):
            seen["begun"] = directory.steps(path.parent)
            self.path, self.saving = path, start_save(path, arrays)

        def result(self):
            self.saving.result()
            seen["stored"] = directory.steps(self.path.parent)

    def watched_write(checkpoint, *arguments):
        write(checkpoint, *arguments)
        seen["whole"] = directory.steps(checkpoint.parent)

    monkeypatch.setattr(orbax_io, "start_save", Watched)
    monkeypatch.setattr(manifest, "write", watched_write)
    with Checkpointer(tmp_path, CONFIG) as checkpointer:
        checkpointer.save(2, state_of(2), None)
    assert seen == {"begun": [1], "stored": [1], "whole": [1, 2]}


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


class FailedSave:
    def __init__(self, error, path):
        self.error, self.path = error, path

    def result(self):
        self.path.mkdir()
        (self.path / "half").write_text("written")
        self.path.with_name(self.path.name + ".orbax-checkpoint-tmp").mkdir()
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        NO_SPACE,
        ValueError("RESOURCE_EXHAUSTED: writing data: [OS error 28: No space left on device]"),
        OSError(122, "x"),
    ],
)
def test_a_full_disk_is_reported_on_the_next_call_and_costs_no_older_checkpoint(tmp_path, monkeypatch, error):
    save(tmp_path, 1, 2)
    checkpointer = Checkpointer(tmp_path, CONFIG)
    monkeypatch.setattr(orbax_io, "start_save", lambda path, arrays: FailedSave(error, path))
    assert checkpointer.save(3, state_of(3), None)
    with pytest.raises(UserError) as caught:
        checkpointer.wait()
    for word in (
        "checkpoints/3",
        "full" if error.args[0] != 122 else "quota",
        "free some space",
        "newest whole checkpoint is 2",
    ):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2", ".lock"}
    checkpointer.close()
    monkeypatch.undo()
    with Checkpointer(tmp_path, CONFIG) as checkpointer:
        assert checkpointer.restore(state_of(0)).step == 2
        assert checkpointer.save(3, state_of(3), None)
        assert checkpointer.restore(state_of(0)).step == 3


def test_a_disk_that_fills_while_the_manifest_is_written_leaves_nothing_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(*_):
        raise NO_SPACE

    monkeypatch.setattr(manifest, "write", fail)
    with pytest.raises(UserError, match="disk full"), Checkpointer(tmp_path, CONFIG) as checkpointer:
        checkpointer.save(2, state_of(2), None)
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", ".lock"}


def test_other_failures_are_not_disguised_and_an_exception_under_way_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_io, "start_save", lambda path, arrays: FailedSave(RuntimeError("a bug"), path))
    with pytest.raises(RuntimeError, match="a bug"), Checkpointer(tmp_path, CONFIG) as checkpointer:
        checkpointer.save(1, state_of(1), None)
    with pytest.raises(KeyError, match="first"), Checkpointer(tmp_path, CONFIG) as checkpointer:
        checkpointer.save(1, state_of(1), None)
        raise KeyError("first")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="another --workdir"):
        Checkpointer(tmp_path / "file")


def test_eight_devices_are_here():
    assert jax.device_count() == 8
