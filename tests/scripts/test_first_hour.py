"""`scripts/first_hour.py`: it fails loudly at the first step that fails. That all succeed, `make first-hour` says."""

import importlib.util
import re
import sys

import pytest
from script_processes import ROOT


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("first_hour_script", ROOT / "scripts/first_hour.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "scripts"))


def test_a_command_that_fails_ends_the_hour_with_its_output(script, tmp_path, capsys):
    hour = script.Hour(tmp_path)
    with pytest.raises(script.StepFailed, match=r"status 3:\n.*told"):
        hour.step("Break", lambda: hour.run("-c", "print('told'); raise SystemExit(3)"))
    hour.step("Work", lambda: hour.run("-c", "print(input())", text="fed\n").strip())
    shown = capsys.readouterr().out
    assert "[1] Break" in shown and "raise SystemExit(3)" in shown and "[2] Work" in shown
    assert re.search(r"    fed\n    \d+\.\d s\n", shown), "each step says what was seen and how long it took"


def test_a_run_that_does_not_resume_is_a_failure(script, tmp_path, monkeypatch):
    hour = script.Hour(tmp_path)
    monkeypatch.setattr(hour, "run", lambda *_, **__: "step 1/100")
    with pytest.raises(script.StepFailed, match="did not resume"):
        script.resume(hour, tmp_path)


def test_every_script_of_the_readme_is_played(script):
    text = (ROOT / "README.md").read_text()
    told = set(re.findall(r"^python scripts/(\w+\.py)", text, flags=re.MULTILINE))
    source = (ROOT / "scripts/first_hour.py").read_text()
    played = set(re.findall(r"scripts/(\w+\.py)\"", source)) | set(re.findall(r'as_told\(hour, "(\w+\.py)"\)', source))
    assert len(told) > 8 and told <= played
