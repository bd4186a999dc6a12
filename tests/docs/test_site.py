"""The site builds without a warning, needs no other host, and looks the same offline."""

import html
import re
import subprocess
import sys

import pytest
from pages import DOCS, ROOT

pytest.importorskip("material", reason="the site is built with mkdocs-material: pip install 'llava-lite[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the directory of the built site."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_every_page_is_built(site):
    for page in DOCS:
        name = page.relative_to(ROOT / "docs").with_suffix("")
        built = site / "index.html" if name.name == "index" else site / name / "index.html"
        assert built.is_file(), name


def test_nothing_is_loaded_from_another_host(site):
    loads = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")
    for built in site.rglob("*.html"):
        assert loads.findall(built.read_text(encoding="utf-8")) == [], built


def test_snippets_are_written_out(site):
    for built in site.rglob("index.html"):
        text = html.unescape(re.sub(r"<[^>]*>", "", built.read_text(encoding="utf-8")))
        # With spaces, as a formatter of Python code writes it, an include is text like any other.
        assert not re.search(r"--\s*8\s*<\s*--", text), built
    page = html.unescape(re.sub(r"<[^>]*>", "", (site / "adding_a_part" / "index.html").read_text(encoding="utf-8")))
    for file in ("encoders/siglip.py", "encoders/__init__.py", "connector/mlp.py", "language_model/llava_qwen3.py"):
        first_line = (ROOT / "llava_lite" / "model" / file).read_text(encoding="utf-8").splitlines()[0]
        assert first_line in page, file


def test_links_and_anchors_lead_somewhere(site):
    for built in site.rglob("index.html"):
        text = built.read_text(encoding="utf-8")
        for target in re.findall(r"<a [^>]*href=[\"']?([^\"' >]+)", text):
            if re.match(r"[a-z]+:|//", target):
                continue
            path, _, anchor = target.partition("#")
            there = (built.parent / path).resolve() if path else built
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{built}: {target}"
            if anchor and there.suffix == ".html":
                assert re.search(rf"id=[\"']?{re.escape(anchor)}[\"' >]", there.read_text(encoding="utf-8")), target
