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
from mlkit.evaluation.verdict import check_model_name
from mlkit.new import Choice, class_bound, common, judge_by, params_text, slug, split_method
from mlkit.serving.repository import server_can_name_it
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
            ("debug", "NAME"), ("why", "NAME"), ("run", "NAME"), ("reproduce", "NAME"), ("serve", "--alias", "NAME"),
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
    "What a person, or a script, gives as reason and as name of who did it stands in the history, on the page and on the terminal as text."
    for name in ("line", "colour", "override", "Jinja", "SQL", "not UTF-8"):
        done = place.run("env", f"GIT_AUTHOR_NAME={NAMES['colour']}", "mlkit", "promote", "champion", "--to", "shadow", "--why", NAMES[name], rc=None)
        assert "Traceback" not in done.stderr and not OBEYED.search(done.stdout.replace("\n", "")), done.stderr[-500:]
        if done.returncode:
            one_line(done)
    shown = place.mlkit("history").stdout
    assert not OBEYED.search(shown.replace("\n", "")) and "{{7*7}}" in shown
    assert not OBEYED.search(place.mlkit("history", "--json").stdout.replace("\n", ""))


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
        if not name.strip(".") or "\0" in name or "/" in name or len(os.fsencode(name)) > 200:
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
    frame = pl.DataFrame({NAMES[what]: range(40), "b": range(40), "y": ["a", "b"] * 20})
    path = tmp_path / f"t.{ending}"
    {"csv": frame.write_csv, "parquet": frame.write_parquet, "jsonl": frame.write_ndjson}[ending](path)
    from mlkit.new import choose
    def made(): choose(open_source(path.name, tmp_path), path.name, "p", "y")
    if what == "NUL" and ending != "csv":
        made() # a name that these hold
    else:
        says(made, word)
