"""The built site: links and anchors lead somewhere, nothing is asked for outside, the search finds."""

import functools
import html.parser
import http.server
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse

import pytest
from blocks import ROOT, blocks

# Attributes whose address a browser asks for by itself.
_ASKED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src")}


class Page(html.parser.HTMLParser):
    """Addresses and anchors of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.asked, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if (tag, name) in _ASKED:
                self.asked.append(value)
            if name in ("href", "src") and value is not None:
                self.links.append(value)


@pytest.fixture(scope="module")
def pages(site):
    return {
        path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html")) if path.name != "404.html"
    }


def dead(pages, site):
    """Links to files and anchors of the site that are not there."""
    found = []
    for path, page in pages.items():
        for link in page.links:
            address = urllib.parse.urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(address.path)).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            name = urllib.parse.unquote(address.fragment)
            anchored = not name or target not in pages or name in pages[target].anchors or name == "__skip"
            if not target.is_file() or not anchored:
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def test_no_link_is_dead(pages, site):
    assert len(pages) > 60
    wrong = dead(pages, site)
    assert not wrong, "\n".join(wrong[:20])


def test_a_dead_link_is_seen(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a href="a.html#x">1</a><a href="a.html#y">2</a><a href="b.html">3</a>'
    )
    path = tmp_path / "a.html"
    assert [each.rpartition(" ")[2] for each in dead({path: Page(path.read_text())}, tmp_path)] == [
        "a.html#y",
        "b.html",
    ]


def test_nothing_is_asked_for_outside(pages, site):
    for path, page in pages.items():
        outside = [address for address in page.asked if urllib.parse.urlsplit(address or "").netloc]
        assert not outside, f"{path.relative_to(site)}: {outside}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_files_that_pages_name_exist():
    """Paths in backticks, such as `examples/digits.py`, of folders of the repository."""
    folders = "benchmarks|clients|deploy|docs|examples|kernels|launch|lepton_xla|manual|tests"
    missing = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8")):
            if not (ROOT / name).exists() and not (ROOT / "lepton_xla" / name).exists():
                missing.append(f"{page.name}: {name}")
    assert not missing, missing


def test_llms_txt_lists_the_pages(site):
    listed, whole = ((site / name).read_text(encoding="utf-8") for name in ("llms.txt", "llms-full.txt"))
    for address in re.findall(r"\]\(([^)]+\.html)\)", listed):
        assert (site / address).is_file(), address
    for name in ("start.html", "guides/quantize.html", "reference/commands.html", "faults.html", "migrate/qwix.html"):
        assert f"]({name})" in listed
    said = re.findall(r"^- \[.+?\]\(.+?\.html\): (.+)$", listed, re.MULTILINE)
    assert len(said) > 60
    assert not [text for text in said if not re.match(r"[A-Z`0-9]", text) and not text.startswith("qwix ")]
    assert "](" not in "".join(said)
    code = blocks((ROOT / "docs" / "start.md").read_text(encoding="utf-8"))[1].code
    assert code in whole
    assert "## lepton_xla.optimize\n\nMake a program small and fast." in whole
    assert "\n::: " not in whole


def test_the_index_has_every_kind_of_page(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    texts = {entry["location"]: entry["title"] + entry["text"] for entry in index["docs"]}
    for location, words in {
        "reference/python/lepton_xla.html#lepton_xla.optimize": "Make a program small and fast",
        "reference/metrics.html": "lepton_inference_requests_total",
        "reference/commands.html#leptonx-repo-push": "--promote",
    }.items():
        found = [text for place, text in texts.items() if place.startswith(location)]
        assert any(words in text for text in found), location


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no Chromium")
    return found


def command(chromium, folder, *options):
    return [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            "--disable-background-networking", "--disable-component-update", "--no-first-run", *options]  # fmt: skip


def rendered(chromium, url, folder):
    """A page's document as a browser leaves it; without workers, for which its clock does not wait."""
    options = ("--virtual-time-budget=15000", "--dump-dom", url)
    done = subprocess.run(command(chromium, folder, *options), capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


# Looks into pages in a frame until each has what it should have, and says so.
PROBE = """<iframe id="f" width="1200" height="900"></iframe><script>
(async () => { for (const [page, selector] of %s) {
  f.src = page;
  while (!f.contentDocument || !f.contentDocument.querySelector(selector)) await new Promise(r => setTimeout(r, 100));
  await fetch("/seen", {method: "POST", body: JSON.stringify(page)});
} })()</script>"""


@pytest.fixture
def serve():
    """Serves a folder with a policy that allows nothing outside.

    Gives its URL, what was asked for nevertheless, and what `PROBE` saw.
    """
    refused, seen, servers = [], [], []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            self.send_header(
                "Content-Security-Policy",
                "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; report-uri /refused",
            )
            super().end_headers()

        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/seen":
                seen.append(sent)
            else:
                refused.append(sent["csp-report"]["blocked-uri"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    def start(folder):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", refused, seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


FOUND = "reference/python/lepton_xla.html#lepton_xla.ArtifactError"


def test_search_from_a_folder(site, chromium, tmp_path):
    assert FOUND in rendered(chromium, f"file://{site}/index.html?q=ArtifactError", tmp_path)


def test_search_and_drawings_over_http_without_anything_outside(site, chromium, serve, tmp_path):
    wanted = [
        ("/index.html?q=ArtifactError", f'a[href*="{FOUND}"]'),
        ("/index.html?q=--max-delay-us", 'a[href*="reference/commands.html#leptonx-serve"]'),
        ("/index.html?q=SecAgg", 'a[href*="guides/federate.html#"]'),
        ("/design.html", "div.mermaid"),
        ("/concepts/weights.html", "div.mermaid"),
    ]
    folder = tmp_path / "served"
    shutil.copytree(site, folder)
    (folder / "probe.html").write_text(PROBE % json.dumps(wanted), encoding="utf-8")
    url, refused, seen = serve(folder)
    browser = subprocess.Popen(command(chromium, tmp_path, "--remote-debugging-port=0", f"{url}/probe.html"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        until(lambda: len(seen) == len(wanted) or refused)
    finally:
        browser.terminate()
        browser.wait(20)
    assert not refused
    assert seen == [page for page, _ in wanted]


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)


def test_a_request_outside_is_seen(chromium, serve, tmp_path):
    (tmp_path / "a.html").write_text('<script src="http://192.0.2.1/x.js"></script>')
    url, refused, _ = serve(tmp_path)
    rendered(chromium, f"{url}/a.html", tmp_path)
    assert refused == ["http://192.0.2.1/x.js"]
