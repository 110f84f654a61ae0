"What people open: the pages in a real browser."
import json
import re
import shutil
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import EVIL, few
from ruamel.yaml import YAML

from mlkit.core import write_json
from mlkit.flow.index import index_page
from mlkit.flow.report import PAGE_POLICY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-sync", "--disable-background-networking",
         "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"]
STAGES = ["ingest", "audit", "prepare", "tune", "train", "evaluate", "explain", "stress", "export", "serve", "release", "monitor"]
PHONE, DESK = 420, 1200 # Pixels

@pytest.fixture(scope="module")
def browser():
    "Chromium with a profile of its own."
    if not CHROMIUM: pytest.skip("not run: the pages in a browser; install Debian's chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()

class Seen:
    "An open page, what its console said, the addresses that it asked for, those that its policy refused."
    def __init__(self, context, path):
        self.console, self.asked, self.refused = [], set(), set()
        context.on("request", lambda r: self.asked.add(r.url) if r.url.startswith(("http", "ws", "ftp")) else None)
        context.on("requestfailed", lambda r: self.refused.add(r.url) if r.failure == "csp" else None) # they never left the browser
        self.page = context.new_page()
        self.page.on("console", lambda m: None if m.text.startswith("Failed to load resource") else self.console.append(m.text))
        self.page.on("pageerror", lambda e: self.console.append(str(e)))
        self.page.goto(path.resolve().as_uri(), wait_until="networkidle", timeout=300_000)
    @property
    def dom(self): return self.page.content()

@pytest.fixture
def browse(browser):
    "A function: path of a page, and how it is looked at -> `Seen`."
    contexts = []
    def look(path, width=DESK, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        return Seen(contexts[-1], path)
    yield look
    for c in contexts: c.close()

def text(dom):
    "The words of a page."
    seen = re.sub(r"(?s)<(style|script).*?</\1>", " ", dom).replace("<wbr>", "") # where a word may be broken
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", seen)).split())

def links(dom): return [unescape(u) for u in re.findall(r'(?:href|src)="([^"]*)"', dom)]

def serious(page):
    "What axe-core finds, by its own judgement serious or critical."
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page).response["violations"]
    return [f"{v['id']} ({len(v['nodes'])}): {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in ("serious", "critical")]

def test_the_browser_sees_what_it_should(browse, tmp_path):
    "A control: a page with an error, a request, a script and texts that nobody can read shows them all."
    (tmp_path / "p.html").write_text('<title>a</title><img src="https://example.com/x.png"><p style="color:#999;background:#fff">pale</p>'
                                     "<script>document.title = 1337; nowhere()</script>")
    seen = browse(tmp_path / "p.html")
    assert "<title>1337</title>" in seen.dom and "nowhere is not defined" in seen.console[0] and seen.asked == {"https://example.com/x.png"}
    assert {f.split()[0] for f in serious(seen.page)} == {"color-contrast", "html-has-lang", "image-alt"}

@pytest.mark.parametrize("page", ["index", "evaluate", "serve", "monitor"])
def test_page(browse, finished, page):
    path = finished / f"reports/{page}.html"
    seen = browse(path)
    dom = seen.dom
    assert seen.console == [] and seen.asked == set()
    for link in links(dom):
        url = urlsplit(link)
        if url.scheme == "data" or not url.path: continue
        assert not url.scheme and (path.parent / unquote(url.path)).is_file(), f"{page}.html: {link[:100]} leads nowhere"
    assert "Traceback" not in text(dom) and not re.search(r"<script", dom)
    verdict = finished.json("reports/metrics/verdict.json")
    if page == "index":
        assert ">Released</h1>" in dom and f"All {len(verdict['criteria'])} criteria are met" in text(dom)
        assert all(c in text(dom) for c in verdict["criteria"])
        assert [l for l in links(dom) if not l.startswith("data:")] == ["registry.html", *(f"{s}.html" for s in finished.stages if s != "index")]
        without = "data:image/png" not in (finished / "reports/tune.html").read_text()
        assert dom.count("data:image/png") == len(STAGES) - without # a picture a stage, where there is one
    else: assert "index.html" in links(dom) and "The values it ran with" in text(dom)
    if page == "serve": assert seen.page.frames[1].locator("img").count() == 2 and seen.page.frames[1].get_by_text("p99_ms").count() == 1
    elif page != "index": assert "data:image/png" in dom

def test_a_page_whose_measurements_are_elsewhere(browse, finished, tmp_path):
    "A fresh clone has the page from DVC's cache, and nothing was measured in it."
    page = shutil.copy(finished / "reports/serve.html", tmp_path)
    seen = browse(Path(page))
    assert seen.page.get_by_text("Not measured here yet: 'mlkit run serve' measures it").is_visible() and seen.console == []

@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["index", "evaluate", "export", "train", "measurements/serve"])
def test_nothing_serious_for_axe(browse, finished, page, scheme):
    "On a phone, where most has to scroll, with the code shown."
    seen = browse(finished / f"reports/{page}.html", PHONE, scheme)
    if page not in ("index", "measurements/serve"): seen.page.get_by_label("show code").check()
    assert serious(seen.page) == []
    assert seen.page.evaluate("document.scrollingElement.scrollWidth") <= PHONE, "the page itself must not scroll sideways"

def test_dark_where_the_system_is(browse, finished):
    ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)"
    card = "getComputedStyle(document.querySelector('.output_png')).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)"
    light, dark = (browse(finished / "reports/train.html", scheme=s).page for s in ("light", "dark"))
    assert light.evaluate(ground) > 700 > 100 > dark.evaluate(ground)
    assert light.evaluate(card) > 700 and dark.evaluate(card) > 650 # figures are drawn in dark ink

def test_code_is_shown_by_keyboard(browse, finished):
    page = browse(finished / "reports/train.html").page
    code = page.locator(".input", has_text="import").first
    assert not code.is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "index.html"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.labels[0].textContent.trim()") == "show code"
    page.keyboard.press("Space")
    assert code.is_visible()
    page.keyboard.press("Space")
    assert not code.is_visible()

MARKED = """() => { const e = document.activeElement; if (e === document.body) return null
  if (e.tagName === 'OBJECT') return true // a frame: the page in it marks what has the focus
  return [e, '::after'].map(x => getComputedStyle(e, x === e ? null : x)).some(s => s.outlineStyle === 'solid' && parseInt(s.outlineWidth) >= 3) }"""

@pytest.mark.parametrize("page", ["index", "evaluate", "export"])
def test_the_keyboard_reaches_all_and_shows_where_it_is(browse, finished, page):
    page = browse(finished / f"reports/{page}.html", PHONE).page
    wanted = page.locator("a, input, [tabindex='0']").count()
    marked = []
    for _ in range(wanted):
        page.keyboard.press("Tab")
        marked.append(page.evaluate(MARKED))
    assert wanted > 2 and marked == [True] * wanted

def test_pictures_say_what_they_show(browse, finished):
    def alts(page): return browse(finished / f"reports/{page}.html").page.locator("img").evaluate_all("es => es.map(e => e.alt)")
    said = {s: alts("measurements/serve" if s == "serve" else s) for s in STAGES if s != "tune"}
    assert all(len(alt) > 10 and not alt.startswith("Picture:") for alts in said.values() for alt in alts), said
    assert any("samples in 10 classes" in alt for alt in said["audit"]) and any("Line training" in alt and "epoch" in alt for alt in said["train"])
    assert any("predicted" in alt and "actual" in alt for alt in said["evaluate"])
    index = browse(finished / "reports/index.html").page.locator(".card:has(img)")
    cards = dict(zip(index.locator("a").evaluate_all("es => es.map(e => e.getAttribute('href').slice(0, -5))"),
                     index.locator("img").evaluate_all("es => es.map(e => e.alt)")))
    assert set(cards) == set(said) and all(alt in said[s] for s, alt in cards.items())

def test_words_of_plots_can_be_read_on_a_phone(browse, finished):
    "A figure that is no wider than `plot.WIDTH` keeps 10 points above 9 pixels; `plot` draws none that is."
    from mlkit.plot import LOOK, SMALLEST, WIDTH
    for stage in ("train", "evaluate", "prepare", "measurements/serve"):
        images = browse(finished / f"reports/{stage}.html", PHONE).page.locator(".output_png img")
        shrunk = images.evaluate_all("es => es.map(e => e.getBoundingClientRect().width / e.naturalWidth)")
        assert shrunk and all(SMALLEST / 72 * LOOK["figure.dpi"] * s >= 9 for s in shrunk), (stage, shrunk, WIDTH)

def test_no_link_of_any_page_is_dead(finished):
    for path in (finished / "reports").glob("*.html"):
        if path.name.startswith("drift"): continue # 4 MB of Evidently's
        html = path.read_text()
        local = [unquote(urlsplit(l).path) for l in links(html) if not l.startswith(("data:", "#", "http"))]
        assert [l for l in local if not (path.parent / l).is_file()] == [] and "http://" not in "".join(links(html)) and "https://" not in "".join(links(html)), path.name

def facts(html):
    "What the page lists above its table."
    return {k: text(v) for k, v in re.findall(r"<dt>(\w+)</dt><dd>(.*?)</dd>", html.split('class="facts"')[1].split("</dl>")[0])}

def test_the_index_says_what_the_run_is_made_from(project):
    project.mlkit("release")
    commit, data = project.git("rev-parse", "HEAD").stdout, next(o["md5"] for o in YAML(typ="safe").load(project / "dvc.lock")["stages"]["ingest"]["outs"] if o["path"] == "data/shards")
    shown = facts((project / "reports/index.html").read_text())
    assert commit.startswith(shown["commit"]) and len(shown["commit"]) == 9 and shown["data"] == f"data/shards {data[:12]}"
    assert re.fullmatch(r"\d+ \w+ 20\d\d, \d\d:\d\d UTC", shown["written"])
    assert (shown["registry"], shown["champion"]) == ("version 1 (challenger, champion)", "this run")
    project.param(explain__n_ordinary=7)
    champion = {k: v for k, v in project.json("champion.json").items() if k != "history"} | {"bundle": "0" * 64, "value": 0.9999}
    (project / "history.jsonl").unlink() # as a project from before there was a history
    (project / "champion.json").write_text(json.dumps(champion))
    project.mlkit("index")
    html = (project / "reports/index.html").read_text()
    shown, page = facts(html), text(html)
    assert shown["commit"].endswith(", not committed: params.yaml") and shown["champion"] == "bundle 000000000000, evaluate.accuracy 1"
    assert "≥ 0.97 1, this run is worse" in page and page.count("this run is") == 1

def test_the_index_is_a_view(project):
    "It is there after every run, says what is so now, and DVC never holds it against what it was."
    page = project / "reports/index.html"
    assert project.dvc("status").stdout.strip() == "Data and pipelines are up to date." and project.git("status", "--short").stdout == ""
    project.mlkit("repro") # the commit is another by now
    first = page.read_bytes()
    project.mlkit("repro")
    assert page.read_bytes() == first, "nothing is new"
    page.unlink()
    project.mlkit("repro")
    assert facts(page.read_text()) | {"written": ""} == facts(first.decode()) | {"written": ""}
    project.param(explain__n_ordinary=4, explain__method={"n_steps": 8})
    project.dvc("repro") # as people do who know DVC
    assert page.read_bytes() != first and "ordinary shown 4" in text(page.read_text())
    assert project.dvc("status").stdout.strip() == "Data and pipelines are up to date."

CRITERIA = {"evaluate.accuracy": 0.9123456, "export.max_difference": 6.55e-07, "audit.columns_that_hold_the_answer": 0.0, "serve.p99_ms": 5.628}

@pytest.mark.parametrize("champion", [False, True])
@pytest.mark.parametrize("width", few([PHONE, DESK, 768, 1000, 600, 900, 1100, 1400], 4))
def test_the_criteria_do_not_scroll_sideways(browse, tmp_path, width, champion):
    "Names of criteria are long, and a champion's column holds a sentence."
    asked = {name: {"asked": "≤ 0.0001", "value": value, "met": True, "higher_is_better": False} for name, value in CRITERIA.items()}
    write_json(tmp_path / "verdict.json", {"released": True, "model": "m", "bundle": "b1", "compare": "serve.p99_ms", "criteria": asked})
    before = {"model": "m", "bundle": "b0", "compare": "serve.p99_ms", "value": 6.1915, "criteria": {k: v * 1.1 for k, v in CRITERIA.items()}}
    facts = {"champion": before} if champion else {}
    (tmp_path / "index.html").write_text(index_page({}, {"release": [tmp_path / "verdict.json"]}, facts), encoding="utf-8")
    seen = browse(tmp_path / "index.html", width)
    room, needed = seen.page.evaluate("(e => [e.clientWidth, e.scrollWidth])(document.querySelector('.scroll'))")
    assert needed <= room and ("this run is better" in text(seen.dom)) == champion

def test_a_label_is_text_and_no_code(browse, pictures, tmp_path):
    project = pictures.clone(tmp_path / "project")
    project.param(audit__block=["conflict"])
    project.mlkit("repro", "prepare")
    shown = set()
    for page in ("ingest", "audit", "prepare"):
        seen = browse(project / f"reports/{page}.html")
        dom = seen.dom
        assert "<title>1337" not in dom and 'src="x"' not in dom and seen.console == [] and seen.asked == set()
        assert "onerror=" not in re.sub(r'&lt;img[^>]*&gt;|alt="[^"]*"', "", dom)
        words = text(dom.replace("&lt;", "\0").replace("&gt;", "\1")).replace("\0", "<").replace("\1", ">")
        shown |= {page} if EVIL in words else set()
    assert shown >= {"ingest", "prepare"} # in the contract, and in the shares of the splits

def drawn(page):
    "What every picture of a page and of its frames weighs: 0 for one that was not drawn."
    return [w for frame in page.frames for w in frame.evaluate("[...document.images].map(e => e.naturalWidth)")]

def test_each_page_keeps_to_its_policy(browse, finished):
    "It stands before all else; pictures and frames are there under it, and the browser has refused nothing."
    pages = [p for p in sorted((finished / "reports").rglob("*.html")) if not p.name.startswith("drift")] # Evidently's has its own
    assert {p.stem for p in pages} >= {*STAGES, "index", "registry"}
    framed = set()
    for path in pages:
        html = path.read_text(encoding="utf-8")
        assert html.count(PAGE_POLICY) == 1 and html.index(PAGE_POLICY) < html.index("<style"), path.name
        seen = browse(path)
        assert seen.console == [] and seen.asked == set() and all(drawn(seen.page)), (path.name, seen.console)
        assert len(seen.page.frames) == 1 + html.count("<object "), path.name
        framed |= {path.stem} if len(seen.page.frames) > 1 else set()
    assert framed >= {"train", "serve"}

BROKEN_IN = ["<script>document.title = 1337</script>", '<img src="https://example.com/x.png">', '<iframe src="https://example.com"></iframe>',
             '<object data="https://example.com/x"></object>', '<link rel="stylesheet" href="https://example.com/x.css">',
             '<style>body { background: url(https://example.com/b.png) }</style>', '<svg onload="document.title = 1337"></svg>']

@pytest.mark.parametrize("evil", BROKEN_IN, ids=lambda e: e[1:e.find(" ")] if " " in e else e[1:7])
def test_the_policy_holds_where_something_gets_through(browse, finished, tmp_path, evil):
    "As if nothing had been made safe before."
    html = (finished / "reports/evaluate.html").read_text(encoding="utf-8")
    (tmp_path / "p.html").write_text(html.replace("<main>", f"<main>{evil}", 1), encoding="utf-8")
    seen = browse(tmp_path / "p.html")
    assert "Content Security Policy" in seen.console[0] and seen.asked <= seen.refused and seen.page.title() != "1337"

def test_an_output_cannot_run_code(browse, finished, tmp_path):
    "A report is made safe where it becomes a page: not even a stage that displays HTML gets a script into it."
    code = '''
import nbformat, sys
from nbformat.v4 import new_code_cell, new_notebook, new_output
from mlkit.flow.report import page
evil = "<b>kept</b><script>document.title=1337</script><img src=x onerror='document.title=1337'><a href='javascript:document.title=1337'>a</a><iframe src='https://example.com'></iframe><svg onload='document.title=1337'></svg>"
alt = "\\"><script>document.title=1337</script><img src=x onerror='document.title=1337'>"
nb = new_notebook(cells=[new_code_cell("1", outputs=[new_output("display_data", data={"text/html": evil}), new_output("display_data", data={"application/javascript": "document.title=1337"}),
    new_output("display_data", data={"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' onload='document.title=1337'><script>document.title=1337</script></svg>"}),
    new_output("display_data", data={"image/png": "cG5n"}, metadata={"image/png": {"alt": alt}}),
    new_output("display_data", data={"text/markdown": evil}), new_output("stream", name="stdout", text=evil), new_output("error", ename="E", evalue=evil, traceback=[evil])])])
open(sys.argv[1], "w").write(page(nb, "<script>document.title=1337</script>"))'''
    out = tmp_path / "evil.html"
    finished.run("python", "-c", code, out)
    seen = browse(out)
    dom = re.sub(r'alt="[^"]*"', "", seen.dom)
    assert "<b>kept</b>" in dom and "<title>1337" not in dom and seen.asked == set() and seen.console == []
    assert not re.search(r"<script|<iframe|<[^>]* on\w+=|<a [^>]*javascript", dom)
