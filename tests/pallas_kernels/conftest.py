"""What the tests of kernels in C++ share."""

import pathlib

import pytest

from pallas_kernels import native


@pytest.fixture
def mutate(monkeypatch, tmp_path):
    """Has a backend in C++ compile its source, or a header of it, with a piece of text replaced."""

    def mutate(backend, symbol, old, new):
        folder = pathlib.Path(backend.__file__).parent
        sources = [
            path for x in (folder, folder.parent / "cpu") for path in x.glob("*.*") if path.suffix in (".cc", ".h")
        ]
        texts = {path.relative_to(folder.parent): path.read_text() for path in sources}
        assert sum(text.count(old) for text in texts.values()) == 1
        for path, text in texts.items():
            to = tmp_path / "sources" / path
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(text.replace(old, new))
        monkeypatch.setenv("MEGABATCH_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(native, "_HEADERS", tmp_path / "sources")
        monkeypatch.setattr(backend, "_SOURCE", tmp_path / "sources" / folder.name / "cpu_kernel.cc")
        assert native.register(backend._SOURCE, symbol).missing is None

    return mutate
