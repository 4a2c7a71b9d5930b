"""The pages are served as they lie here: each vendored file is that of the published package, and all of it stays small."""

import gzip
import hashlib
import re
from pathlib import Path

import cllm

STATIC = Path(cllm.__file__).parent / "app" / "static"
VENDOR = STATIC / "vendor"
ROW = re.compile(r"^\| (\S+) \| (\S+) \| (\S+) \| ([0-9a-f]{64}) \|$", re.MULTILINE)


def test_vendored_files_are_those_of_the_table_with_their_hashes_and_licences():
    text = (VENDOR / "README.md").read_text()
    rows = ROW.findall(text)
    assert {name for name, *_ in rows} == {each.relative_to(VENDOR).as_posix() for each in VENDOR.rglob("*") if each.is_file()} - {"README.md"}
    for name, package, _, expected in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == expected, name
        licence = re.search(rf"^\| {re.escape(package)} \| [\d.]+ \| [^|]*\((LICENSE-[\w.]+)", text, re.MULTILINE)
        assert licence and (VENDOR / licence[1]).is_file(), package


def test_the_whole_page_stays_below_400_kB():
    """All tabs with all libraries as the app sends them: compressed. Uncompressed they stay below half a megabyte."""
    files = {each.relative_to(STATIC).as_posix(): each.read_bytes() for each in STATIC.rglob("*") if each.suffix in {".html", ".css", ".js", ".svg"}}
    assert sum(len(gzip.compress(each)) for each in files.values()) < 200_000
    assert sum(map(len, files.values())) < 500_000, sorted(((len(each), name) for name, each in files.items()), reverse=True)[:10]


def test_nothing_of_the_page_names_another_host_or_runs_inline():
    for each in [*STATIC.glob("*.html"), *STATIC.glob("*.css"), *STATIC.glob("css/*.css"), *STATIC.glob("js/**/*.js")]:
        text = each.read_text()
        hosts = set(re.findall(r"https?://([\w.-]+)", text)) - {"www.w3.org", "docs.example.org"}  # the namespace of SVG; what a field shows
        assert not hosts, (each.name, hosts)
        assert "innerHTML" not in text and "eval(" not in text and "insertAdjacentHTML" not in text, each.name
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bstyle=|\bon\w+=|<style", page)
