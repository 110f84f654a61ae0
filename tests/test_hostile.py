"What others write: hostile names, code in names as browsers would run it, and secrets that nothing may repeat."
import os
import re
import subprocess
import tarfile
from contextlib import chdir
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from conftest import brief, one_line
from ruamel.yaml import YAML
from test_new import Made, new
from test_report import CHROMIUM, browser  # noqa: F401 (a fixture)
from test_registry import a_verdict
from test_source import says

from mlkit.cli import main
from mlkit.core import LONGEST, OBEYED, ConfigError, DataError, MlkitError, RegistryError, masked, write_json
from mlkit.data.shards import write_shards
from mlkit.registry.verdict import check_model_name
from mlkit.new import Choice, class_bound, common, judge_by, params_text, slug, split_method
from mlkit.triton_server.repository import server_can_name_it
from mlkit.sources.locator import original
from mlkit.sources.registry import open_source
from mlkit.training.check import experiment_can_be_named

# Names

NAMES = {
    "parent": "../up", "parent on Windows": "..\\up", "absolute": "/planted", "drive": "C:\\planted", "share": "\\\\host\\planted",
    "home": "~/planted", "this": ".", "above": "..", "a slash": "a/b", "NUL": "a\0b", "line": "a\nb", "return": "a\rb", "tab": "a\tb",
    "bell": "a\a\b", "colour": "\x1b[31mred\x1b[0m", "a title": "\x1b]0;planted\x07", "C1": "a\x9b31mb", "override": "a\u202egpj.exe",
    "isolate": "\u2066a\u2069", "no width": "a\u200bb\ufeff", "long": "n" * 5000, "long and wide": "モ" * 300, "device": "CON",
    "device with ending": "nul.txt", "option": "--help", "short option": "-rf", "shell": "$(touch planted)", "backticks": "`touch planted`",
    "semicolon": "; touch planted #", "pipe": "a|touch planted", "star": "*", "brackets": "[a-z]?{x,y}", "regex": "^.*$",
    "Jinja": "{{7*7}}", "format": "{0.__class__}", "percent": "%s%n%(x)d", "YAML tag": "!!python/object:os.system {a: *b}",
    "YAML comment": "a: b # c", "SQL": "' OR 1=1; DROP TABLE runs; --\"", "look-alike": "d\u0456gits", "not UTF-8": os.fsdecode(b"caf\xe9"),
    "empty": "", "blank": "  ", "prototype": "__proto__", "of mlkit": "_row", "answer": "predicted", "certainty": "confidence",
    "null": "null", "NaN": "NaN", "a file at a commit": "HEAD~1:params.yaml"}

COMMANDS = [("promote", "NAME", "--to", "shadow"), ("promote", "1", "--to", "NAME"), ("promote", "1", "--to", "shadow", "--model", "NAME"),
            ("rollback", "NAME"), ("rollback", "1", "--model", "NAME"), ("compare", "NAME"), ("compare", "1", ".", "--model", "NAME"),
            ("debug", "NAME"), ("run", "NAME"), ("reproduce", "NAME"), ("serve", "--alias", "NAME"),
            ("history", "--model", "NAME"), ("contract", "show", "NAME"), ("params", "NAME"), ("NAME",)]


def everything(folder):
    "Every path below a folder, but git's and DVC's own."
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not {".git", ".dvc", "__pycache__"} & set(p.parts)}


def faults_of(done):
    "What is wrong with how a command ended: a traceback, more than a line, something that a terminal obeys."
    error = done.exception if not isinstance(done.exception, (SystemExit, type(None))) else None
    if error:
        return [f"{type(error).__name__}: {error}"[:200]]
    shown = done.output.replace("\n", "").replace("\x1b[32m", "").replace("\x1b[33m", "").replace("\x1b[1m", "").replace("\x1b[0m", "")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    found = [f"a terminal obeys {m!r}" for m in OBEYED.findall(shown)]
    if done.exit_code == 1 and len(lines) != 1:
        found.append(f"{len(lines)} lines: {lines[:3]}"[:300])
    return found + [f"{len(line)} letters" for line in lines if len(line) > LONGEST]


@pytest.fixture(scope="module")
def place(finished, tmp_path_factory):
    "A clone, in a folder of its own."
    return finished.clone(tmp_path_factory.mktemp("place") / "project")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_arguments(place, monkeypatch, command):
    "An answer, or one line that a terminal can show; nothing runs, nothing is written elsewhere."
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before, found = everything(place.root.parent), {}
    with chdir(place.root):
        for what, name in NAMES.items():
            done = CliRunner().invoke(main, [name if part == "NAME" else part for part in command], color=True)
            found[what] = faults_of(done)
    assert {what: faults for what, faults in found.items() if faults} == {}
    written = everything(place.root.parent) - before
    assert {p for p in written if not p.startswith(("project/.mlkit/", "project/reports/", "project/mlflow.db", "project/scratch"))} == set()


def test_a_reason_is_a_line(place):
    "What a person, or a script, gives as reason stands in the history, which stays whole, and on the terminal as text."
    from mlkit.registry.history import append, event, read_history
    one, before = {"version": "1", "bundle": "ab" * 32}, (place / "history.jsonl").read_bytes()
    for name in (*NAMES.values(), "a\u2028b\x85c\x1ed"):
        append(place.root, [event("shadow", "digits", one, name, "promote")])
    kept = [e["why"] for e in read_history(place.root)][-len(NAMES) - 1:]
    assert kept == [*NAMES.values(), "a\u2028b\x85c\x1ed"]
    shown = [place.mlkit("history", *args).stdout for args in ([], ["--json"])]
    assert all("{{7*7}}" in text and not OBEYED.search(text.replace("\n", "")) for text in shown)
    (place / "history.jsonl").write_bytes(before)


def test_a_name_that_is_not_utf8_on_a_real_terminal(place):
    one_line(place.mlkit("run", NAMES["not UTF-8"], rc=1), r"caf\udce9")


@pytest.mark.parametrize("check, place", [
    (lambda n: check_model_name(n), "release.model_name"),
    (lambda n: server_can_name_it({"serve": {"name": n}}, Path()), "serve.name"),
    (lambda n: experiment_can_be_named({"train": {"experiment": n}}, Path()), "train.experiment")])
def test_names_in_params(check, place):
    "Each passes, or is refused before the first stage, by its place."
    passed = []
    for what, name in NAMES.items():
        try:
            check(name)
            passed.append(what)
        except ConfigError as e:
            assert str(e).startswith(f"params.yaml: {place}: ") and len(str(e)) < 600 and not OBEYED.search(str(e)), what
    never = {"NUL", "line", "colour", "override", "long", "empty", "blank", "not UTF-8", "SQL"}
    assert not never & set(passed) and {"prototype", "of mlkit", "null", "device"} <= set(passed)
    if place != "train.experiment":
        assert not {"parent", "absolute", "a slash", "shell", "star", "option"} & set(passed)


def test_experiments_that_pass_work(tmp_path, monkeypatch):
    "In a database and in a folder; nothing appears beside the store."
    from mlkit.training.track import Run
    (tmp_path / "project").mkdir()
    (tmp_path / "project/params.yaml").touch()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for what, name in NAMES.items():
        try:
            experiment_can_be_named({"train": {"experiment": name}}, Path())
        except ConfigError:
            continue
        in_folder = what in ("parent", "absolute", "home", "above", "percent", "YAML tag", "null")
        for uri in ("sqlite:///mlflow.db", *(["mlruns"] if in_folder else [])):
            with Run(name, {"a": 1}, uri) as run:
                run.log(1, loss=0.1)
            assert run.client.get_experiment_by_name(name).name == name
    assert {p.name for p in tmp_path.iterdir()} == {"project"} and not (tmp_path / "project/planted").exists()


def test_a_made_project_has_names_that_pass():
    "Whatever its folder is called."
    for name in NAMES.values():
        made = slug(name)
        check_model_name(made)
        server_can_name_it({"serve": {"name": made}}, Path())
        experiment_can_be_named({"train": {"experiment": made}}, Path())


@pytest.mark.parametrize("what", NAMES)
def test_params_say_what_was_chosen(what):
    "A label, a column or a path stands in comments of params.yaml, and never ends one."
    name = NAMES[what].encode(errors="replace").decode() # YAML is UTF-8
    contract = type("Contract", (), {"group": name, "time": None})
    sections = common("p", Choice(f"../{name}", f"because of {name}"))
    judge_by(sections, *class_bound({name: 9, "other": 90, "third": 90}))
    sections["ingest"]["target"] = Choice(name, f"'{name}' is last")
    sections["prepare"]["method"] = split_method(contract)
    text = params_text(sections, f"Chosen for {name}")
    wanted = {stage: {k: c.value for k, c in values.items()} for stage, values in sections.items()}
    got = YAML(typ="safe").load(text)
    assert {stage: values or {} for stage, values in got.items()} == wanted


@pytest.mark.parametrize("place", ["ingest.source", "ingest.contract", "prepare.golden", "train.candidates", "release.model_name", "serve.name", "train.experiment"])
def test_a_name_that_is_too_long_for_a_file(place):
    "Of whatever letters: refused by its place before the first stage, and not in the words of the operating system."
    from mlkit.flow.checks import names_fit_files
    from mlkit.registry.verdict import model_can_be_named
    section, key = place.split(".")
    for name in ("n" * 256, "n" * 5000, "é" * 128, "モ" * 90, "𝒜" * 64):
        values = {section: {key: [name] if key == "candidates" else name}}
        with pytest.raises(ConfigError) as e:
            for check in (names_fit_files, model_can_be_named, server_can_name_it, experiment_can_be_named):
                check(values, Path("nowhere"))
        assert str(e.value).startswith(f"params.yaml: {place}") and "Errno" not in str(e.value) and len(str(e.value)) < 400


FOLDERS = ["line", "shell", "option"]

def test_a_project_of_a_hostile_name(tmp_path, monkeypatch):
    "`mlkit new NAME`: it is made, or refused in a line; nothing runs and nothing appears elsewhere."
    rows = "\n".join(f"{i % 7 / 2},{'ab'[i % 2]}" for i in range(60))
    (tmp_path / "t.csv").write_text(f"x,y\n{rows}\n")
    monkeypatch.chdir(tmp_path)
    for what in FOLDERS:
        done = CliRunner().invoke(main, ["new", "--from", "t.csv", "--", NAMES[what]], color=True)
        assert done.exit_code == 0 and faults_of(done) == [], (what, done.output[-500:], done.exception)
        YAML(typ="safe").load(tmp_path / NAMES[what] / "params.yaml")
    for name in (NAMES["long"], NAMES["long and wide"], "n" * 230, f"a/{'é' * 128}", "a" + "/b" * 3000):
        done = CliRunner().invoke(main, ["new", "--from", "t.csv", "--", name], color=True)
        assert done.exit_code == 1 and faults_of(done) == [] and "the project's folder: the " in done.stderr and "use a shorter one" in done.stderr
    for what in ("long", "parent", "above"):
        inner = tmp_path / "inner"
        inner.mkdir(exist_ok=True)
        with chdir(inner):
            done = CliRunner().invoke(main, ["new", "--from", "nowhere.csv", "--", NAMES[what]], color=True)
        assert done.exit_code == 1 and faults_of(done) == [], what
    assert {p.name for p in tmp_path.iterdir()} == {"t.csv", "inner", *(NAMES[w] for w in FOLDERS)}


def png(i): return cv2.imencode(".png", np.full((4, 4), i, np.uint8))[1].tobytes()


def test_images(tmp_path):
    "File names and folder names: all are brought in, as text in one line, and lead back to their files."
    made = 0
    for what, name in NAMES.items():
        if name.startswith(".") or not name or "\0" in name or "/" in name or len(os.fsencode(name)) > 200:
            continue
        for label, file in ((name, "1.png"), (name, "2.png"), ("usual", f"{name}.png")):
            (tmp_path / "pets" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "pets" / label / file).write_bytes(png(made % 250))
            made += 1
    index = write_shards(open_source("pets", tmp_path).images(), tmp_path / "shards")
    assert len(index) == made and not any(re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", n) for n in [*index["name"], *index["label"]])
    assert all((tmp_path / "pets" / original(n)).is_file() for n in index["name"])
    assert {p.name for p in tmp_path.iterdir()} == {"pets", "shards"}


def test_a_tar_leaves_its_folder_never(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/a.tar", "w") as tar:
        for name in ("../../up/1.png", "/planted/2.png", "a/../../3.png", "a/4.png", "b/5.png", "C:\\planted\\6.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png(1))
            tar.addfile(info, BytesIO(png(1)))
        link = tarfile.TarInfo("b/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    try:
        index = write_shards(open_source("in/a.tar", tmp_path).images(), tmp_path / "shards")
        assert len(index) <= 6
    except DataError as e:
        assert not OBEYED.search(str(e))
    assert {p.name for p in tmp_path.iterdir()} <= {"in", "shards"} and not Path("/planted").exists()


@pytest.mark.parametrize("what, word", [("star", "several columns"), ("regex", "several columns"), ("of mlkit", "mlkit uses this name itself"), ("NUL", "zero bytes")])
@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_columns_that_cannot_be(tmp_path, what, word, ending):
    frame = pl.DataFrame({NAMES[what]: [0.5, 1.5, 3.5] * 20, "b": [1.5, 2.5] * 30, "y": ["a", "b"] * 30})
    path = tmp_path / f"t.{ending}"
    {"csv": frame.write_csv, "parquet": frame.write_parquet, "jsonl": frame.write_ndjson}[ending](path)
    from mlkit.new import choose
    says(lambda: choose(open_source(path.name, tmp_path), path.name, "p", "y"), word if ending == "csv" or what == "of mlkit" else "rename it")


# Code in names

SET, OUT = "document.title=1337", "https://example.com/x"
PAYLOADS = [
    f'<img src=x onerror="{SET}">', f"<script>{SET}</script>", f'"><script>{SET}</script>', f"'><svg onload={SET}>", f"<svg/onload={SET}>",
    f"</title><script>{SET}</script>", f"</style><script>{SET}</script>", f"</script><script>{SET}</script>",
    f"</textarea><img src=x onerror={SET}>", f"--><script>{SET}</script>", f"]]><script>{SET}</script>", f'";{SET};//', f"';{SET};//",
    f"`${{{SET}}}`", f"</pre></div><img src={OUT}1 onerror={SET}>", f'<iframe srcdoc="<script>parent.{SET}</script>">',
    f"<details open ontoggle={SET}>x", f"<input autofocus onfocus={SET}>", f"<body onload={SET}>", f"<object data={OUT}2></object>",
    f'<meta http-equiv="refresh" content="0;url={OUT}3">', "<base href=https://example.com/>", f"<link rel=stylesheet href={OUT}4>",
    f"<style>@import '{OUT}5';body{{display:none}}</style>",
    f'<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror={SET}&gt;">', f"[a](javascript:{SET})",
    f'![a]({OUT}6 "x")', "{{constructor.constructor('" + SET + "')()}}", f"\\u003cimg src=x onerror={SET}\\u003e",
    f"&lt;img src=x onerror={SET}&gt;", f"<x onmouseover={SET} style=position:fixed;inset:0>", "<script>alert(1337)</script>"]
COLUMNS, VALUES, LABELS, TARGET = PAYLOADS[2:18], PAYLOADS, PAYLOADS[20:22], PAYLOADS[0]


def hostile_table(path, n=300):
    "Names of columns, categories and labels are code; four columns say something about the label."
    random, data, score = np.random.default_rng(0), {}, np.zeros(n)
    for i, name in enumerate([*COLUMNS, "platform", "predicted", "confidence", "{{7*7}}", "../up", "=1+1"]):
        if i % 2:
            data[name] = random.normal(size=n).round(3)
            score += (i < 8) * data[name]
        else:
            values = [VALUES[(3 * i + j) % len(VALUES)] for j in range(3)]
            data[name] = [values[k] for k in random.integers(0, 3, n)]
    data[TARGET] = np.where(score + random.normal(size=n) / 2 > 0, *LABELS)
    pl.DataFrame(data).write_csv(path)


# What the environment and files of a person hold while the stages run. The bytes are not those of anything else.
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted01+wJalrXUtnFEMI", "AWS_SESSION_TOKEN": "planted02FwoGZXIvYXdz", "HF_TOKEN": "hf_planted03AbCdEfGhIjKlMnOpQrStUvWx",
    "PGPASSWORD": "planted04-pg", "MLFLOW_TRACKING_PASSWORD": "planted05-mlflow", "MLFLOW_TRACKING_TOKEN": "planted06-mlflow",
    "GITHUB_TOKEN": "ghp_planted07AbCdEfGhIjKlMnOpQrStUvWxYz", "KAFKA_PASSWORD": "planted08-kafka", "PIP_INDEX_URL": "https://me:planted09@127.0.0.1/simple",
    "HTTPS_PROXY": "http://me:planted10@127.0.0.1:9", "MLKIT_SIGNING_KEY": ""}
FILES = {".netrc": "machine example.com login me password planted11-netrc\n", ".pgpass": "*:*:*:me:planted12-pgpass\n",
         ".aws/credentials": "[default]\naws_secret_access_key = planted13-aws\n", ".config/kcat.conf": "sasl.password=planted14-kcat\n"}
DOTENV = "DB_PASSWORD=planted15-dotenv\n"


class Planted(Made):
    "A project of a person who has secrets."
    @property
    def env(self):
        home = self.root.parent / "home"
        key = (home / "key.pem").read_text() if (home / "key.pem").is_file() else ""
        return super().env | SECRETS | {"HOME": str(home), "MLKIT_SIGNING_KEY": key, "NO_PROXY": "*"}


def hostile_shop(folder):
    "Made and run once: its names are code, and its person has secrets."
    from mlkit.registry.signing import new_keys
    hostile_table(folder / "t.csv")
    for name, text in FILES.items():
        (folder / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "home" / name).write_text(text)
    made, _ = new(folder / "shop", "--from", folder / "t.csv", "--target", TARGET)
    project = brief(Planted(made.root))
    private, public = new_keys()
    (folder / "home/key.pem").write_bytes(private)
    (project / "signing.pub").write_bytes(public)
    (project / ".env").write_text(DOTENV)
    card = dict(zip(("intended_use", "intended_users", "out_of_scope", "owner", "license", "ethics", "caveats"), PAYLOADS[25:]))
    project.param(train__experiment=PAYLOADS[0], train__candidates=["linear"], train__n_epochs=1, release__card=card,
                  release__criteria={"evaluate.accuracy": {"min": 0.1}}, release__compare="evaluate.accuracy",
                  release__protect={"audit.errors": {"max": 99}, "evaluate.shortfall": {"max": 1}, "evaluate.constant_p_better": {"max": 1}})
    project.git("add", "-A")
    project.git("commit", "-qm", PAYLOADS[1])
    said = [project.mlkit("repro")]
    project.git("add", "-A")
    project.git("commit", "-qm", "a run")
    said.append(project.mlkit("promote", "1", "--to", "shadow", "--why", PAYLOADS[7]))
    said.append(project.mlkit("debug", "0", "--html"))
    said.append(project.mlkit("compare", "1", "."))
    project.said["all"] = "".join(done.stdout + done.stderr for done in said)
    return project


@pytest.fixture(scope="module")
def shop(shared):
    return shared("hostile", hostile_shop, Planted)


def opened(browser, path, act=lambda page: None):
    "The text of a page, after it did all that it would: no code ran, no request was tried, nothing opened."
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    asked, said, page = [], [], context.new_page()
    context.on("request", lambda r: asked.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    page.on("dialog", lambda d: (said.append(d.message), d.dismiss()))
    page.on("console", lambda m: None if m.text == "Failed to load resource: net::ERR_FILE_NOT_FOUND" else said.append(m.text)) # <img src=x>
    page.on("pageerror", lambda e: said.append(str(e)))
    page.goto(path.resolve().as_uri(), wait_until="load", timeout=300_000)
    title = page.title()
    act(page)
    page.wait_for_timeout(50)
    assert (page.title(), page.url, asked, said) == (title, path.resolve().as_uri(), [], []) and title != "1337", path.name
    odd = "base, embed, iframe, math, object:not(.frame), meta[http-equiv=refresh], link, input[autofocus], body > style, [onerror], [onload], [onfocus], [ontoggle], [onmouseover]"
    assert page.locator(odd).count() == 0, path.name
    assert page.locator("a[href^='javascript' i]").count() == 0, path.name
    text = " ".join(page.evaluate("document.body.innerText").split())
    context.close()
    return text


def words(text): return " ".join(text.split())


@pytest.mark.skipif(not CHROMIUM, reason="not run: the pages in a browser; install Debian's chromium")
def test_pages_show_code_as_text(shop, browser):
    "Every page that a run leaves, those of `compare` and `debug`, and the one of the registry."
    pages = [p for p in sorted((shop / "reports").rglob("*.html")) if not p.name.startswith("drift")]
    assert {"index", "registry", "compare", "debug", "ingest", "audit", "evaluate", "explain", "release", "monitor"} <= {p.stem for p in pages}
    shown = {p.stem: opened(browser, p, lambda page: page.get_by_label("show code").check() if page.get_by_label("show code").count() else None) for p in pages}
    for name in (*COLUMNS[:4], *LABELS):
        assert words(name) in shown["ingest"], name
    for label in LABELS:
        assert words(label) in shown["debug"] and words(label) in shown["evaluate"]
    assert words(PAYLOADS[7]) in shown["registry"] and words(PAYLOADS[25]) in shown["release"].replace("\\", "")


def unfold(page):
    "Evidently's rows, with their pictures."
    buttons = page.get_by_label("Detail panel visibility toggle")
    buttons.first.wait_for()
    for i in range(buttons.count()):
        buttons.nth(i).click()
    page.locator("svg.main-svg").first.wait_for()


@pytest.mark.skipif(not CHROMIUM, reason="not run: the pages in a browser; install Debian's chromium")
@pytest.mark.parametrize("half", [0, 1])
def test_pages_of_evidently_show_code_as_text(tmp_path, browser, half):
    "Each payload as the name of a column and as a category; the pictures are drawn from them."
    from mlkit.monitoring.drift import compare_samples
    random = np.random.default_rng(0)
    def sample(n):
        names = PAYLOADS[half::2]
        classes = {p: [PAYLOADS[(i + j) % len(PAYLOADS)] for j in random.integers(0, 6, n)] for i, p in enumerate(names) if i % 2}
        return pl.DataFrame({p: classes.get(p, random.normal(size=n)) for p in names})
    compare_samples(sample(60), sample(60), page=tmp_path / "drift.html")
    text = opened(browser, tmp_path / "drift.html", unfold)
    assert sum(words(p) in text for p in PAYLOADS[half::2]) >= 5 # as many as a page of its table has


@pytest.mark.skipif(not CHROMIUM, reason="not run: the pages in a browser; install Debian's chromium")
def test_pages_from_any_text(browser, tmp_path):
    "Evidence, reasons, persons, titles and outputs: each payload in each place of the pages that mlkit renders itself."
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
    from mlkit.evaluation.debug import Step, debug_page
    from mlkit.registry.history import event
    from mlkit.registry.side_by_side import Comparison, Side, compare_page
    from mlkit.flow.index import index_page
    from mlkit.flow.registry_page import registry_page
    from mlkit.flow.report import page
    asked = {p: {"asked": p, "value": 1.0, "met": False, "higher_is_better": True, "why": p, "mend": p} for p in PAYLOADS}
    write_json(tmp_path / "verdict.json", a_verdict("ab" * 32) | {"released": False, "outcome": "refused", "criteria": asked, "model": PAYLOADS[0]})
    changed = PAYLOADS[3:]
    facts = {"commit": PAYLOADS[1], "changed": changed, "data": {"path": PAYLOADS[2], "md5": PAYLOADS[3]}, "beside": {p: p for p in PAYLOADS}, "moves": PAYLOADS}
    one = {"version": PAYLOADS[4], "bundle": PAYLOADS[5]}
    entries = [{"n": i, "when": p, "who": p} | event(what, p, one, p, p, one, against={"text": p}, value=1.0, compare=p, data=p)
               for i, (p, what) in enumerate((p, what) for p in PAYLOADS for what in ("released", "champion"))]
    rows = [{"kind": p, "what": p, "a": p, "b": p, "stage": p, "metric": p, "difference": p, "mark": p, "same": False, "criterion": p} for p in PAYLOADS]
    both = Comparison(Side(PAYLOADS[0], PAYLOADS[1]), Side(PAYLOADS[2], PAYLOADS[3]), rows, rows, rows, PAYLOADS[4], [], PAYLOADS, PAYLOADS)
    outputs = [new_output("stream", name="stdout", text="\n".join(PAYLOADS))]
    for p in PAYLOADS:
        outputs += [new_output("display_data", data={"text/html": p, "text/plain": p}), new_output("display_data", data={"text/plain": p}),
                    new_output("display_data", data={"image/png": "cG5n"}, metadata={"image/png": {"alt": p}}),
                    new_output("error", ename=p, evalue=p, traceback=[p])]
    notebook = new_notebook(cells=[new_markdown_cell("# t"), new_code_cell("'" + PAYLOADS[7] + "'", outputs=outputs)])
    made = {"index": index_page({}, {"release": [tmp_path / "verdict.json"]}, facts), "registry": registry_page(entries),
            "broken": registry_page([], "; ".join(PAYLOADS)), "compare": compare_page(both), "report": page(notebook, PAYLOADS[5]),
            "debug": debug_page(PAYLOADS[5], [Step(p, [p], [{p: p, "contract": p}]) for p in PAYLOADS])}
    for name, html in made.items():
        (tmp_path / f"{name}.html").write_text(html, encoding="utf-8")
        text = opened(browser, tmp_path / f"{name}.html")
        assert [p for p in PAYLOADS if words(p) not in text] == [], name


# Secrets

PLANTED = {k: re.search(r"planted\d\d[\w+-]*", v)[0] for k, v in (SECRETS | FILES | {".env": DOTENV}).items() if "planted" in v}


def bytes_of(project):
    "Everything that lies in a project, git's objects unpacked; not what its person has written there."
    for f in sorted(project.root.rglob("*")):
        if f.is_file() and f.name != ".env":
            yield f.relative_to(project.root).as_posix(), f.read_bytes()
    packed = subprocess.run(["git", "cat-file", "--batch", "--batch-all-objects"], cwd=project.root, capture_output=True, check=True)
    yield ".git", packed.stdout


def leaks(project, wanted):
    "path: which of the secrets are in it."
    found = {name: [w for w in wanted if w.encode() in data] for name, data in bytes_of(project)}
    assert len(found) > 100
    return {name: secrets for name, secrets in found.items() if secrets}


def test_secrets_are_in_no_artifact(shop):
    "Reports, models, bundle, registry, database, lock and logs, and what was said on the way."
    key = [line for line in (shop.root.parent / "home/key.pem").read_text().splitlines() if not line.startswith("-")]
    wanted = [*PLANTED.values(), *key]
    assert len(PLANTED) == len({w[:9] for w in PLANTED.values()}) == 15 and len(key) > 1
    assert leaks(shop, wanted) == {}
    assert [w for w in wanted if w in shop.said["all"]] == []


def test_a_leak_would_be_seen(shop, tmp_path):
    "A control: each secret, written where a careless line of code would write it."
    project = shop.clone(tmp_path / "shop")
    places = ["reports/train.html", "reports/metrics/train.json", "models/bundle/card.md", "params.yaml", "mlflow.db", "history.jsonl", ".mlkit/note"]
    planted = {}
    for i, secret in enumerate(PLANTED.values()):
        place = places[i % len(places)]
        (project / place).parent.mkdir(parents=True, exist_ok=True)
        with open(project / place, "ab") as f:
            f.write(f"\nurl: postgres://me:{secret}@host/db\n".encode())
        planted.setdefault(place, []).append(secret)
    assert leaks(project, PLANTED.values()) == planted
    project.git("add", "-f", "params.yaml") # what was committed once stays in git, also when the file is mended
    project.git("commit", "-qm", "a slip")
    for place in places:
        (project / place).unlink()
    assert leaks(project, PLANTED.values()) == {".git": planted["params.yaml"]}


REFUSED = ["postgres://me:s3cr3t@host/db", "postgresql://me:p@s3cr3t@host/db", "postgresql://host/db?table=t&password=s3cr3t", "mysql://me:s3cr3t/x@host/db",
           "s3://key:s3cr3t@bucket/x.csv", "https://me:s3cr3t@example.com/x.csv", "https://s3cr3t0123456789abcdef@example.com/x.csv",
           "https://example.com/x.csv?X-Amz-Signature=s3cr3t", "https://x.blob.core.windows.net/c/x.csv?sv=1&sig=s3cr3t", "ftp://:s3cr3t@host/x.csv",
           "kafka://me:s3cr3t@host/topic", "kafka://host/topic?sasl.password=s3cr3t", "sqlite:///x.db?key=1&token=s3cr3t",
           "postgresql://host/db?sslpassword=s3cr3t", "gs://bucket/x.csv?access_token=s3cr3t",
           *(f"postgresql://me:{p}@host:5432/db?table=t" for p in ("1234/s3cr3t", "1234?s3cr3t", "1234#s3cr3t", "1234@s3cr3t", "1234:s3cr3t", "/s3cr3t", "?s3cr3t", "#s3cr3t", "@s3cr3t", "1'2\"s3cr3t")),
           "https://me:99/s3cr3t@example.com/x.csv", "kafka://me@server:12/s3cr3t@host:9092/topic"]

@pytest.mark.parametrize("source", REFUSED)
def test_a_source_with_a_secret_is_refused(tmp_path, monkeypatch, source):
    "By `mlkit new`, before anything is written, and in params.yaml, before the first stage; nobody repeats it."
    from mlkit.flow.config import check_secrets
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["new", "shop", "--from", source, "--target", "y"])
    assert done.exit_code == 1 and "s3cr3t" not in done.output and not list(tmp_path.iterdir()), done.output
    assert "take it out" in done.output, done.output
    for values in ({"source": source}, {"own": {"urls": [source]}}):
        with pytest.raises(ConfigError, match="holds a password, a token or a key") as e:
            check_secrets("ingest", values, "params.yaml")
        assert "s3cr3t" not in str(e.value)
    assert "s3cr3t" not in masked(f"no answer from '{source}'")


IN_PARAMS = [{"password": "s3cr3t"}, {"db": {"api_key": "s3cr3t"}}, {"auth_token": "s3cr3t"}, {"x": "host=h user=me password=s3cr3t"},
             {"x": "-----BEGIN PRIVATE KEY-----\ns3cr3t\n"}, {"x": "AKIA0123456789ABCDEF"}, {"x": ["ghp_" + "s3cr3t" * 6]}]

def test_a_secret_in_params_goes_no_further(shop, tmp_path):
    "It is the user's own, in params.yaml; no command copies it or says it."
    project = shop.clone(tmp_path / "shop")
    with chdir(project.root):
        for values in IN_PARAMS:
            project.param(train__mine=values)
            for command in (["repro"], ["run", "train"], ["why", "train"], ["params"], *([["compare", "1", "."]] if values == IN_PARAMS[0] else [])):
                done = CliRunner().invoke(main, command)
                assert not re.search("s3cr3t|AKIA01234", done.output + str(done.exception)), (command, values)
                assert command[0] not in ("repro", "run") or "holds a password, a token or a key" in done.stderr
    (project / "params.yaml").unlink()
    assert [name for name, data in bytes_of(project) if re.search(b"s3cr3t|AKIA01234", data)] == []


@pytest.mark.parametrize("address", [
    "http://me:s3cr3t@127.0.0.1:9", "https://s3cr3t@127.0.0.1:9", "me:s3cr3t@127.0.0.1:9", "postgresql://me:s3cr3t@127.0.0.1:9/db",
    "mysql+pymysql://me:s3@cr3t@127.0.0.1:9/db", "http://127.0.0.1:9/?token=s3cr3t", "http://me:s3cr3t@", "http://me:s3cr3t@host:port",
    "file://me:s3cr3t@host/runs", "sqlite://me:s3cr3t@host", "databricks://s3cr3t@profile", "nonsense://me:s3cr3t@host"])
def test_an_address_of_mlflow_keeps_its_password(tmp_path, monkeypatch, address):
    from mlkit.registry.store import fetch
    from mlkit.training.track import Run
    (tmp_path / "params.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlkit.training.store.WAIT", 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for act in (lambda: Run("digits", {}).__enter__(), lambda: fetch("digits", "1", tmp_path / "got")):
        with pytest.raises(RegistryError) as e:
            act()
        assert not re.search("s3.?cr3t|cr3t", str(e.value)) and "\n" not in str(e.value)


@pytest.mark.parametrize("key", ["-----BEGIN PRIVATE KEY-----\\ns3cr3t\\n-----END PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----s3cr3t", "-----BEGIN s3cr3t"])
def test_a_key_that_is_none_is_not_repeated(monkeypatch, key):
    from mlkit.registry.signing import signing_key
    monkeypatch.setenv("MLKIT_SIGNING_KEY", key)
    with pytest.raises(MlkitError) as e:
        signing_key()
    assert "s3cr3t" not in str(e.value)
