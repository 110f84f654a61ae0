"What a project meets outside: notebooks of other editors, other locales, other tools on the PATH, git; and values that are wrong."
import difflib
import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import BIN, COLD, FULL, Project, few, one_line, ran, wait_for
from ruamel.yaml import YAML

from mlkit.flow.config import UNHASHED
from mlkit.flow.git import set_up_git
from mlkit.flow.notebook import clean, notebook_text, read_notebook
from mlkit.flow.pipeline import library_notebooks

ROOT = Path(__file__).resolve().parents[1]
PYTHON3 = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def code(source, *tags, **fields):
    metadata = {"tags": list(tags)} if tags else {}
    return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": [], "execution_count": None} | fields


def write_notebook(path, cells, metadata={"kernelspec": PYTHON3}, minor=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": minor}, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")


def stage_cells(name, body, parameters="n: int = 1", **declared):
    "The cells of a stage, with ids."
    declaration = f"from mlkit.flow.stage import Stage\nstage = Stage({name!r}, **{declared!r})"
    sources = [(parameters, "parameters"), (declaration,), (body,)]
    return [code(s, *tags, id=f"{name}-{i}") for i, (s, *tags) in enumerate(sources)]


class Small(Project):
    "A project that has no mlkit in its folder: it takes that of this checkout."
    @property
    def env(self):
        return super().env | {"PYTHONPATH": os.pathsep.join([str(self.root), str(ROOT)])}


@pytest.fixture
def small(tmp_path):
    "A project of two stages: 'make' writes a number, 'fit' adds a list of numbers to it. Text in it is not ASCII."
    project = Small(tmp_path / "project")
    make = stage_cells("make", "print('né ☃'); stage.output('x').write_text(str(n)); 'é'", writes={"x": "data/x"})
    fit = stage_cells("fit", "m = int(stage.input('x').read_text()) + sum(steps)\nstage.output('m').write_text(str(m)); m",
                      "steps: list[int] = [1]\nwidth: int | None = None", reads={"x": "data/x"}, writes={"m": "models/m"})
    write_notebook(project / "nbs/stages/make.ipynb", make)
    write_notebook(project / "nbs/stages/fit.ipynb", fit)
    (project / "params.yaml").write_text("make:\n  n: 3   # é\nfit:\n  steps: [1, 2]\n  width: null   # as wide as it is\n", encoding="utf-8")
    project.git("init", "-q")
    project.dvc("init", "-q")
    (project / ".gitignore").write_text(".mlkit/\n/data/\n/models/\n/reports/\n/scratch/\n.ipynb_checkpoints/\n")
    yield project
    for p in project.processes():
        p.kill()


# Notebooks as other editors save them

def as_string(cells):
    return [c | {"source": "".join(c["source"])} for c in cells]


def without_ids(cells):
    return [{k: v for k, v in c.items() if k != "id"} for c in cells]


EDITORS = { # what is done to the cells, the metadata, the minor version
    "no kernelspec": (as_string, {"language_info": {"name": "python"}, "orig_nbformat": 4}, 5),
    "no metadata": (as_string, {}, 5),
    "no ids": (without_ids, {"kernelspec": PYTHON3}, 5),
    "VS Code": (without_ids, {"language_info": {"name": "python", "version": "3.11.4"}, "orig_nbformat": 4, "vscode": {"interpreter": {"hash": "0"}}}, 2),
    "another kernel": (as_string, {"kernelspec": {"display_name": ".venv", "language": "python", "name": "no-such-kernel"}}, 4),
    "one id twice": (lambda cells: [c | {"id": "same"} for c in cells], {"kernelspec": PYTHON3}, 5),
    "lines": (lambda cells: [c | {"source": c["source"].splitlines(keepends=True)} for c in cells], {"kernelspec": PYTHON3}, 5),
}


PAIRS = [*zip(list(EDITORS)[::2], [*list(EDITORS)[1::2], "no metadata"])]


@pytest.mark.parametrize("first, second", few(PAIRS, 2))
def test_a_notebook_of_any_editor_runs_and_exports(small, first, second):
    "Two people with an editor each work on one project: each has a stage and a module."
    for editor, stage in ((first, "make"), (second, "fit")):
        change, metadata, minor = EDITORS[editor]
        path = small / f"nbs/stages/{stage}.ipynb"
        write_notebook(path, change(json.loads(path.read_text())["cells"]), metadata, minor)
        cells = [code(f"#| default_exp of_{stage}", id="a"), code("#| export\nx = 'é'", id="b")]
        write_notebook(small / f"nbs/of_{stage}.ipynb", change(cells), metadata, minor)
    assert ran(small.mlkit("repro", "fit").stdout) == ["make", "fit"]
    assert (small / "models/m").read_text() == "6"
    assert all("x = 'é'" in (small / f"of_{stage}.py").read_text(encoding="utf-8") for stage in ("make", "fit"))
    reports = [small / f"reports/{stage}.ipynb" for stage in ("make", "fit")]
    for report in reports:
        nbformat.validate(nbformat.read(report, 4))
    before = [report.read_bytes() for report in reports]
    assert ran(small.mlkit("repro", "-f", "fit").stdout) == ["make", "fit"]
    assert [report.read_bytes() for report in reports] == before # ids that are filled in are the same each time


# Locales

LOCALES = [{"LC_ALL": "POSIX"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"LC_ALL": "", "LANG": "C"}]


@pytest.mark.parametrize("locale", few(LOCALES, 2))
def test_any_locale(small, locale):
    "Python's own cures for such locales are switched off. Warm kernels in the first, ordinary ones in the others."
    def mlkit(*args):
        settings = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"} | locale | ({} if locale == LOCALES[0] else COLD)
        return small.run("env", *(f"{k}={v}" for k, v in settings.items()), "mlkit", *args)
    write_notebook(small / "nbs/index.ipynb", [{"cell_type": "markdown", "metadata": {}, "source": "# É ☃"}])
    write_notebook(small / "nbs/own.ipynb", [code("#| default_exp own"), code("#| export\nx = 'é'")])
    make = json.loads((small / "nbs/stages/make.ipynb").read_text(encoding="utf-8"))["cells"]
    make[2]["source"] += "\nimport own; Path = __import__('pathlib').Path; print(own.x, len(Path('params.yaml').read_text()))"
    write_notebook(small / "nbs/stages/make.ipynb", make)
    mlkit("render")
    assert (small / "README.md").read_text(encoding="utf-8") == "# É ☃\n"
    done = mlkit("repro", "fit")
    assert ran(done.stdout) == ["make", "fit"] and "│ né ☃" in done.stdout
    assert "né ☃" in (small / "reports/make.html").read_text(encoding="utf-8")
    assert "né ☃" in mlkit("run", "make").stdout
    (small / "own.py").write_text("x = 'é'  # ☃\n", encoding="utf-8")
    os.utime(small / "own.py", (2e9, 2e9)) # newer than its notebook
    small.git("add", "-A")
    assert "own.py: " in mlkit("why", "make").stdout
    reports = small.outputs()
    small.mlkit("repro", "-f", "fit") # in this process's own locale
    assert small.outputs() == reports


# DVC rewrites params.yaml

def test_dvc_exp_run_rewrites_params(small):
    small.mlkit("render")
    small.commit()
    assert ran(small.dvc("exp", "run", "fit", "-S", "make.n=5").stdout) == ["make", "fit"]
    text = (small / "params.yaml").read_text(encoding="utf-8")
    assert "null" not in text and "[1, 2]" not in text # it has written the file anew
    assert (small / "models/m").read_text() == "8"
    assert small.mlkit("why", "fit").stdout == "fit is up to date\n"
    assert ran(small.mlkit("repro", "fit").stdout) == [] # what DVC ran need not run again
    small.dvc("exp", "run", "fit", "-S", "fit.steps=[4]", "-S", "fit.width=7")
    assert ran(small.mlkit("repro", "fit").stdout) == [] and (small / "models/m").read_text() == "9"
    small.param(fit__width=None)
    assert ran(small.mlkit("repro", "fit").stdout) == ["fit"]
    small.git("checkout", "params.yaml")
    assert ran(small.mlkit("repro", "fit").stdout) == ["make", "fit"] and (small / "models/m").read_text() == "6"


# Names that DVC leaves out when it looks for a former run

def test_the_refused_names_are_those_that_dvc_ignores():
    from dvc.stage.cache import _get_cache_hash
    from dvc_data.hashfile.meta import Meta
    def key(name, value):
        return _get_cache_hash({"cmd": "x", "params": {"params.yaml": {"fit": {"deep": [{name: value}]}}}}, key=True)
    names = {*Meta.fields, "md5", "hash", "path", "cmd", "params", "deps", "outs", "desc", "meta", *UNHASHED, *UNHASHED.values()}
    assert {name for name in names if key(name, 1) == key(name, 2)} == set(UNHASHED)


PLACES = [lambda v: v, lambda v: {"width": v}, lambda v: {"steps": [1, [v]]}, lambda v: {"no_such": {"a": {"b": v}}}]
WHERE = [(name, inside) for i, name in enumerate(UNHASHED) for inside in PLACES[:None if FULL or not i else 1]] # one name in all places, each in one


@pytest.mark.parametrize("name, inside", WHERE)
def test_names_that_dvc_ignores_are_refused(small, name, inside):
    small.param(fit=inside({name: 8}))
    done = small.mlkit("repro", rc=1)
    one_line(done, "params.yaml: fit.", f".{name}: DVC ignores the name '{name}'", "another name")
    assert ran(done.stdout) == []


@pytest.mark.parametrize("cell, place", [("nfiles: int = 1", "nfiles"), ("model: dict = {'deep': [{'size': 8}]}", "model.deep.0.size")])
def test_a_parameters_cell_with_such_a_name_is_refused(small, cell, place):
    write_notebook(small / "nbs/stages/fit.ipynb", stage_cells("fit", "pass", cell))
    for command in ("repro", "render"):
        one_line(small.mlkit(command, rc=1), f"fit.ipynb: {place}: DVC ignores the name")


# What else is installed

HINTS = """import warnings, logging, sys
from pathlib import Path
from lightning_fabric import Fabric
Fabric(accelerator="cpu", devices=1)
warnings.warn("of this cell")
import sklearn; warnings.warn_explicit("of a package", UserWarning, sklearn.__file__, 1)
print(Path.cwd(), stage.output("x"), sys.prefix, file=sys.stderr)
stage.output("x").write_text("3")"""


def test_a_page_does_not_say_what_is_installed(small, tmp_path):
    "Slurm's `srun` on the PATH makes Lightning print a hint with a path in it; any warning names a file."
    write_notebook(small / "nbs/stages/make.ipynb", stage_cells("make", HINTS, writes={"x": "data/x"}))
    small.mlkit("repro", "make")
    reports, before = small.outputs("make"), (small / "reports/make.ipynb").read_text()
    (srun := tmp_path / "bin/srun").parent.mkdir()
    srun.write_text("#!/bin/sh\nexit 1\n")
    srun.chmod(0o755)
    settings = COLD | {"PATH": f"{srun.parent}:{BIN}:{os.environ['PATH']}", "PYTHONWARNINGS": "always"}
    small.run("env", *(f"{k}={v}" for k, v in settings.items()), "mlkit", "repro", "-f", "make")
    assert small.outputs("make") == reports, "".join(difflib.unified_diff(before.splitlines(True), (small / "reports/make.ipynb").read_text().splitlines(True)))
    page = (small / "reports/make.html").read_text(encoding="utf-8")
    assert "of this cell" in page and "sklearn/__init__.py:1: UserWarning" in page and "srun" not in page
    for folder in (small.root, sys.prefix, Path.home(), "/tmp/", ".mlkit/aside"):
        for f in reports:
            assert str(folder) not in (small / f).read_text(encoding="utf-8"), (f, folder)


IN_SLURM = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize("job", few([{}, IN_SLURM, IN_SLURM | {"SLURM_JOB_NAME": "interactive"}], 2))
def test_training_does_not_ask_slurm(tmp_path, job):
    "Not where its `srun` is on the PATH, and not in a job of four tasks: mlkit trains in this process."
    (srun := tmp_path / "bin/srun").parent.mkdir()
    srun.write_text("#!/bin/sh\nexit 1\n")
    srun.chmod(0o755)
    code = "from mlkit.training.fit import make_fabric; f = make_fabric('cpu', '32-true', 1, 0); print(f.world_size, f.global_rank)"
    path = f"{srun.parent}:{os.environ['PATH']}"
    done = subprocess.run([sys.executable, "-W", "always::UserWarning", "-c", code], env=os.environ | job | {"PATH": path}, capture_output=True, text=True)
    assert done.stdout == "1 0\n" and "srun" not in done.stderr and "SLURM" not in done.stderr, done.stderr


# Libraries that tell their makers how they are used

ASKS = """import json
from evidently.telemetry import event_logger
from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY
from mlflow.telemetry.utils import is_telemetry_disabled
silent = {"evidently": not event_logger.is_enabled(), "hub": HF_HUB_DISABLE_TELEMETRY, "mlflow": is_telemetry_disabled()}
stage.output("x").write_text(json.dumps(silent))"""
CI = ("CI", "GITHUB_ACTIONS", "GITLAB_CI", "JENKINS_URL", "BUILDKITE") # there MLflow is silent by itself


def test_no_library_of_a_stage_sends_figures_of_use(small):
    "What a person has set stays."
    write_notebook(small / "nbs/stages/make.ipynb", stage_cells("make", ASKS, writes={"x": "data/x"}))
    def silent(*settings):
        unset = [part for name in (*CI, "DO_NOT_TRACK") for part in ("-u", name)]
        small.run("env", *unset, *settings, "mlkit", "repro", "-f", "make")
        return small.json("data/x")
    assert silent() == {"evidently": True, "hub": True, "mlflow": True}
    assert silent("MLFLOW_DISABLE_TELEMETRY=false", "HF_HUB_DISABLE_TELEMETRY=0") == {"evidently": True, "hub": False, "mlflow": False}


# A kernel that fails at its start

DIES = """import os
from pathlib import Path
if "JPY_PARENT_PID" in os.environ and (left := sorted(Path(__file__).parent.glob("die*"))):
    left[0].unlink()
    os._exit(1)
"""


def test_a_kernel_that_fails_at_its_start_is_started_once_more(small):
    "In a process of its own a kernel runs `sitecustomize` before it can answer."
    (small / "sitecustomize.py").write_text(DIES)
    small.mlkit("repro", "make") # the checks, which run in such a process too, have passed
    (small / "die1").touch()
    done = small.mlkit("repro", "fit")
    assert ran(done.stdout) == ["fit"] and done.stdout.count("its kernel failed at its start") == 1
    for i in range(2):
        (small / f"die{i}").touch()
    one_line(small.mlkit("repro", "-f", "make", rc=1), "make: ", "Kernel died")
    assert not small.strays() and (small / "data/x").read_text() == "3"


# Values that do not fit each other

def test_shares_are_checked_before_the_first_stage(fresh, tmp_path):
    "Without torch, Polars or the data."
    project = fresh.clone(tmp_path / "project")
    for shares in ({"train": 0.7, "validation": 0.3, "test": 0.2}, {"train": 1.0, "validation": 0.1, "test": -0.1}, {"train": 0.5, "test": 0.5}):
        project.param(prepare__shares=shares)
        for command in (["repro"], ["run", "ingest"]):
            done = project.mlkit(*command, rc=1)
            one_line(done, "params.yaml: prepare.shares: ", "sum 1")
            assert "▸ ingest" not in done.stdout or command == ["run", "ingest"]
    imported = project.run("env", "PYTHONPROFILEIMPORTTIME=1", "mlkit", "repro", rc=1).stderr
    assert not {line.rpartition("|")[2].strip() for line in imported.splitlines()} & {"torch", "polars", "mlflow", "cv2"}


def test_criteria_are_checked_before_the_first_stage(small):
    scores = "import json; stage.output('scores').write_text(json.dumps({'accuracy': n / 4, 'calm': True}))"
    write_notebook(small / "nbs/stages/evaluate.ipynb", stage_cells("evaluate", scores, metrics={"scores": "reports/metrics/evaluate.json"}))
    write_notebook(small / "nbs/stages/release.ipynb", stage_cells("release", "stage.output('v').write_text('1')", "criteria: dict[str, dict[str, float]] = {}",
                   reads={"scores": "reports/metrics/evaluate.json"}, writes={"v": "models/v"}))
    def ask(name, n=3, rc=0):
        values = YAML().load(small / "params.yaml") | {"evaluate": {"n": n}, "release": {"criteria": {name: {"min": 0.5}}}}
        YAML().dump(values, small / "params.yaml")
        return small.mlkit("repro", "release", rc=rc)
    for wrong, says in (("evalute.accuracy", "did you mean 'evaluate'"), ("make.accuracy", "no stage 'make' gives metrics"), ("accuracy", "no stage 'accuracy'")):
        done = ask(wrong, rc=1)
        one_line(done, "release.criteria", says)
        assert ran(done.stdout) == []
    assert ran(ask("evaluate.accuracy").stdout) == ["evaluate", "release"]
    for wrong in ("evaluate.acuracy", "evaluate.calm"): # the stage has run: its numbers are known
        done = ask(wrong, rc=1)
        one_line(done, f"no stage measures '{wrong}'")
        assert ran(done.stdout) == []
    assert ran(ask("evaluate.f1", n=4).stdout) == ["evaluate", "release"] # with other values it may measure something else


# git

@pytest.fixture
def repository(small):
    "The small project in git, set up as `mlkit setup` and `mlkit new` do."
    for path in (small / "nbs/stages").glob("*.ipynb"):
        path.write_text(notebook_text(clean(read_notebook(path))), encoding="utf-8")
    assert set_up_git(small.root, str(BIN / "mlkit"), small / ".mlkit/prefix")
    small.mlkit("repro", "fit")
    small.commit()
    assert small.git("status", "--short").stdout == ""
    return small


def test_a_notebook_run_by_hand_is_no_change(repository):
    "By `jupyter execute`, which no hook sees: no difference, nothing to commit. An edit is one."
    book = repository / "nbs/stages/fit.ipynb"
    repository.run("jupyter", "execute", "--inplace", book)
    assert "execution_count\": 3" in book.read_text() and '"language_info"' in book.read_text()
    assert repository.git("diff").stdout == ""
    repository.git("add", "-A")
    assert repository.git("status", "--short").stdout == "" and '"text/plain"' in book.read_text() # what it showed is still there
    book.write_text(book.read_text().replace("m = int(", "m = 1 + int("))
    changed = [line for line in repository.git("diff", "-U0").stdout.splitlines() if line.startswith(("+ ", "- "))]
    assert len(changed) == 2, changed


def test_a_notebook_saved_in_jupyterlab_leaves_the_status_clean(repository, tmp_path):
    "A real server saves what the browser sends; its own hook settles the notebook."
    book, runtime = repository / "nbs/stages/fit.ipynb", tmp_path / "runtime"
    settings = {"JUPYTER_CONFIG_PATH": repository / ".mlkit/prefix/etc/jupyter", "JUPYTER_RUNTIME_DIR": runtime, "HOME": tmp_path}
    before = nbformat.read(book, 4)
    repository.run("jupyter", "execute", "--inplace", book)
    content = json.loads(book.read_text())
    book.write_text(nbformat.writes(before) + "\n")
    assert repository.git("status", "--short").stdout == ""
    with repository.started("env", *(f"{k}={v}" for k, v in settings.items()), "jupyter", "server", "--no-browser", "--allow-root", "--ip=127.0.0.1",
                            "--ServerApp.port=0", "--IdentityProvider.token=t") as p:
        info = wait_for(lambda: next(runtime.glob("jpserver-*.json"), None), "the server")
        wait_for(lambda: info.read_text().endswith("}"), "all of its file")
        told = json.loads(info.read_text())
        def listens():
            with socket.socket() as s: return s.connect_ex(("127.0.0.1", told["port"])) == 0
        wait_for(listens, "that it listens, which it does after it has written its file")
        url = told["url"] + "api/contents/nbs/stages/fit.ipynb"
        for source, status in (("", ""), ("edited = 1", " M nbs/stages/fit.ipynb\n")):
            content["cells"][-1]["source"] = source or content["cells"][-1]["source"]
            body = json.dumps({"type": "notebook", "format": "json", "content": content}).encode()
            request = urllib.request.Request(url, body, {"Authorization": "token t", "Content-Type": "application/json"}, method="PUT")
            with urllib.request.urlopen(request) as answered:
                assert answered.status == 200
            wait_for(lambda: repository.git("status", "--short").stdout == status, f"the status {status!r}: {p.err.read_text()[-2000:]}")
            assert '"text/plain"' in book.read_text()


def test_git_works_without_the_filter(repository):
    "The command is gone, fails, or is killed: git takes the file as it is."
    book = repository / "nbs/stages/fit.ipynb"
    for i, text in enumerate((None, "exit 1", "kill -9 $$")):
        command = repository / f".mlkit/command{i}"
        if text:
            command.write_text(f"#!/bin/sh\n{text}\n")
            command.chmod(0o755)
        assert set_up_git(repository.root, str(command), repository / ".mlkit/prefix")
        book.write_text(book.read_text() + " ")
        assert "M nbs/stages/fit.ipynb" in repository.git("status", "--short").stdout
        repository.git("add", "-A")
        repository.git("commit", "-qm", "taken as it is")
        assert repository.git("status", "--short").stdout == ""


def test_all_notebooks_of_this_checkout_are_clean_and_one_process_says_so(fresh, tmp_path):
    "As nbdev-clean would leave them. git starts the filter once, however many files it asks about."
    project = fresh.clone(tmp_path / "project")
    assert set_up_git(project.root, str(BIN / "mlkit"), tmp_path)
    project.commit()
    books = [*library_notebooks(project.root), *(project / "nbs/stages").glob("*.ipynb")]
    for book in books:
        os.utime(book)
    seen = project.run("env", f"GIT_TRACE={tmp_path / 'trace'}", "git", "status", "--short").stdout
    assert seen == "" and len(books) > 80
    assert (tmp_path / "trace").read_text().count("clean-notebooks") <= 2 # the line that says it, and the shell's
