"""The site builds, without a warning and without the network."""

import re
import subprocess
import sys

import pytest
from pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    # A proxy that is not there: what would ask the network fails.
    command = ["env", "https_proxy=http://127.0.0.1:9", "http_proxy=http://127.0.0.1:9"]
    command += [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(folder / "html")]
    command += ["-d", str(folder / "doctrees")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder / "html"


@pytest.mark.slow
def test_pages_and_reference_are_there_and_links_lead_somewhere(site):
    """Every page of ours, every module, and no local link that is broken, whoever wrote it."""
    for page in (ROOT / "docs/guides").glob("*.md"):
        assert (site / f"guides/{page.stem}.html").exists()
    lamb = (site / "reference/ml/ml.optim.html").read_text()
    assert 'id="ml.optim.lamb.lamb"' in lamb and "Algorithm 2" in lamb
    pages = {path: path.read_text() for path in site.rglob("*.html") if "repository" not in path.parts}
    for path, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"#?]+)(?:#[^"]*)?"', text):
            if "://" not in link and not link.startswith(("mailto:", "data:", "file:")):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


@pytest.mark.slow
def test_nothing_is_fetched_by_a_reader(site):
    """No fonts, scripts or pictures of others: the site works where there is no network."""
    for path in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", path.read_text()):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag) or 'rel="canonical"' in tag, tag
