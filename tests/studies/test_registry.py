"""`ml/studies/registry.py`: a study is a file in the folder, and nothing else is to be done."""

import sys

import ml.studies
from ml.studies.registry import load, studies


def test_the_folder_is_the_table(tmp_path, monkeypatch):
    before = studies()
    assert before["lamb_batch_size"].startswith("LAMB: as the batch grows") and "outcome" not in before
    (tmp_path / "found.py").write_text('"""First line.\n\nMore.\n"""\n\n\ndef run(budget):\n    return budget\n')
    (tmp_path / "helper.py").write_text("def walk(budget):\n    return budget\n")
    (tmp_path / "unread.py").write_text("def run(budget):\n    return budget\n\n\nraise RuntimeError('imported')\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text('"""In a folder."""\n\n\ndef run(budget):\n    pass\n')
    monkeypatch.setattr(ml.studies, "__path__", [*ml.studies.__path__, str(tmp_path)])
    added = {"found": "First line.", "package": "In a folder.", "unread": ""}
    assert studies() == dict(sorted((before | added).items())), "sorted, and listing imports nothing"
    assert load("found")("cpu") == "cpu"
    monkeypatch.delitem(sys.modules, "ml.studies.found")


def test_every_study_says_what_it_is():
    assert all(studies().values())
