"""`ml/studies/record.py`: what is written comes back, and nothing is half there."""

import dataclasses

import pytest
from outcome_cases import outcome, record

from ml.errors import UserError
from ml.studies import record as records
from ml.studies.record import read_records, write_record, write_whole


def test_records_come_back_in_the_order_of_their_names(tmp_path):
    given = [record("b"), record("a", budget="gpu"), record("a", outcome=outcome(relation="~", tolerance=1.0))]
    for each in given:
        write_record(each, tmp_path / "studies")
    assert sorted(path.name for path in (tmp_path / "studies").iterdir()) == ["a.json", "a_gpu.json", "b.json"]
    back = read_records(tmp_path / "studies")
    assert [dataclasses.replace(each, outcome=None) for each in back] == [
        dataclasses.replace(each, outcome=None) for each in (given[2], given[1], given[0])
    ]
    assert back[0].outcome == given[2].outcome
    assert read_records(tmp_path / "nowhere") == []


@pytest.mark.parametrize("text", ["{", "[]", '{"study": "a"}', '{"studies": 1}'])
def test_what_is_no_record_is_named(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        read_records(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    write_whole(path, "whole\n")

    def fail(self, text):
        with open(self, "w") as file:
            file.write(text[:2])
        raise OSError(28, "disk full", str(self))

    monkeypatch.setattr(records.Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "other\n")
    assert path.read_text() == "whole\n" and list(tmp_path.iterdir()) == [path]
