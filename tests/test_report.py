"What people open: the pages in a real browser."
import re, shutil, subprocess
from html import unescape
from urllib.parse import unquote, urlsplit

import pytest
from conftest import EVIL

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OWN = ("update.googleapis.com", "clients2.google.com", "accounts.google.com", "redirector.gvt1.com") # what Chromium asks for by itself, also for an empty page
STAGES = ["ingest", "audit", "prepare", "tune", "train", "evaluate", "explain", "export", "serve", "release", "monitor"]

@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    "A function: page -> (its DOM, what its console said, the addresses that it asked for)."
    if not CHROMIUM: pytest.skip("not run: the pages in a browser; install Debian's chromium")
    home = tmp_path_factory.mktemp("chromium")
    def open_page(path, profile=str(home / "profile")):
        net = home / "net.json"
        done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync", "--disable-background-networking",
            "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", f"--log-net-log={net}", "--virtual-time-budget=4000",
            f"--user-data-dir={profile}", "--dump-dom", path.resolve().as_uri()], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        console = [l for l in done.stderr.splitlines() if "CONSOLE" in l]
        asked = {u for u in re.findall(r'"url":"([^"]*)"', net.read_text()) if u.startswith(("http", "ws", "ftp")) and urlsplit(u).hostname not in OWN}
        return done.stdout, console, asked
    return open_page

def text(dom): return " ".join(unescape(re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<(style|script).*?</\1>", " ", dom))).split())
def links(dom): return [unescape(u) for u in re.findall(r'(?:href|src)="([^"]*)"', dom)]

def test_the_browser_sees_what_it_should(browse, tmp_path):
    "A control: a page with an error, a request and a script shows all three."
    (tmp_path / "p.html").write_text('<title>a</title><img src="https://example.com/x.png"><script>document.title = 1337; nowhere()</script>')
    dom, console, asked = browse(tmp_path / "p.html")
    assert "<title>1337</title>" in dom and "nowhere is not defined" in console[0] and asked == {"https://example.com/x.png"}

@pytest.mark.parametrize("page", ["index", "evaluate", "serve", "drift_noisy"])
def test_page(browse, finished, page):
    path = finished / f"reports/{page}.html"
    dom, console, asked = browse(path)
    assert console == [] and asked == set()
    if page.startswith("drift"): return # Evidently's own
    for link in links(dom):
        url = urlsplit(link)
        if url.scheme == "data" or not url.path: continue
        assert not url.scheme and (path.parent / unquote(url.path)).is_file(), f"{page}.html: {link[:100]} leads nowhere"
    assert "Traceback" not in text(dom) and not re.search(r"<script", dom)
    verdict = finished.json("reports/metrics/verdict.json")
    if page == "index":
        assert "<h1>Released</h1>" in dom and f"All {len(verdict['criteria'])} criteria are met" in text(dom)
        assert all(c in text(dom) for c in verdict["criteria"]) and [l for l in links(dom) if not l.startswith("data:")] == [f"{s}.html" for s in finished.stages if s != "index"]
        assert dom.count("data:image/png") == len(STAGES) - ("data:image/png" not in (finished / "reports/tune.html").read_text()) # a picture a stage, where there is one
    else: assert "index.html" in links(dom) and "The values it ran with" in text(dom) and "data:image/png" in dom

def test_no_link_of_any_page_is_dead(finished):
    for path in (finished / "reports").glob("*.html"):
        if path.name.startswith("drift"): continue # 4 MB of Evidently's
        html = path.read_text()
        local = [unquote(urlsplit(l).path) for l in links(html) if not l.startswith(("data:", "#", "http"))]
        assert [l for l in local if not (path.parent / l).is_file()] == [] and "http://" not in "".join(links(html)) and "https://" not in "".join(links(html)), path.name

def test_a_label_is_text_and_no_code(browse, pictures, tmp_path):
    project = pictures.clone(tmp_path / "project")
    project.param(audit__block=["conflict"])
    project.mlkit("repro", "prepare")
    shown = 0
    for page in ("ingest", "audit", "prepare"):
        dom, console, asked = browse(project / f"reports/{page}.html")
        assert "<title>1337" not in dom and 'src="x"' not in dom and "onerror=" not in re.sub(r"&lt;img[^>]*&gt;", "", dom) and console == [] and asked == set()
        shown += EVIL in text(dom.replace("&lt;", "\0").replace("&gt;", "\1")).replace("\0", "<").replace("\1", ">")
    assert shown == 2 # in the contract, and in the shares of the splits

def test_an_output_cannot_run_code(browse, finished, tmp_path):
    "A report is made safe where it becomes a page: not even a stage that displays HTML gets a script into it."
    code = '''
import nbformat, sys
from nbformat.v4 import new_code_cell, new_notebook, new_output
from mlkit.flow.report import page
evil = "<b>kept</b><script>document.title=1337</script><img src=x onerror='document.title=1337'><a href='javascript:document.title=1337'>a</a><iframe src='https://example.com'></iframe><svg onload='document.title=1337'></svg>"
nb = new_notebook(cells=[new_code_cell("1", outputs=[new_output("display_data", data={"text/html": evil}), new_output("display_data", data={"application/javascript": "document.title=1337"}),
    new_output("display_data", data={"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' onload='document.title=1337'><script>document.title=1337</script></svg>"}),
    new_output("display_data", data={"text/markdown": evil}), new_output("stream", name="stdout", text=evil), new_output("error", ename="E", evalue=evil, traceback=[evil])])])
open(sys.argv[1], "w").write(page(nb, "<script>document.title=1337</script>"))'''
    out = tmp_path / "evil.html"
    finished.run("python", "-c", code, out)
    dom, console, asked = browse(out)
    assert "<b>kept</b>" in dom and "<title>1337" not in dom and asked == set() and console == []
    assert not re.search(r"<script|<iframe|<[^>]* on\w+=|<a [^>]*javascript", dom)
