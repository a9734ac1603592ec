"""`ml/memory_maps.py`: counted, and said before they run out."""

import mmap

import pytest

from ml import memory_maps
from ml.errors import UserError


@pytest.mark.skipif(not memory_maps._USED.exists(), reason="memory maps are counted on Linux")
def test_maps_are_counted(monkeypatch, tmp_path):
    before = memory_maps.used_share()
    assert 0 < before < 0.9
    # Every other one is read-only, lest neighbours become one.
    kept = [mmap.mmap(-1, 4096, access=mmap.ACCESS_READ if i % 2 else mmap.ACCESS_WRITE) for i in range(1000)]
    limit = int(memory_maps._LIMIT.read_text())
    assert memory_maps.used_share() - before == pytest.approx(len(kept) / limit, rel=0.05)
    memory_maps.check_room()
    (tmp_path / "limit").write_text(f"{int(before * limit)}\n")
    monkeypatch.setattr(memory_maps, "_LIMIT", tmp_path / "limit")
    with pytest.raises(UserError, match=r"of the memory maps .* vm\.max_map_count=262144"):
        memory_maps.check_room()


def test_elsewhere_nothing_is_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_maps, "_USED", tmp_path / "none")
    assert memory_maps.used_share() == 0.0
    memory_maps.check_room()
