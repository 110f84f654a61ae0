"The whole pipeline on the real data: it releases, does nothing twice, reruns what it must and nothing else, and gives the same bytes anywhere."
import json, os, shutil, sqlite3, sys
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from conftest import BIN, ran, sha256
from mlkit.flow.pipeline import library_notebooks
from ruamel.yaml import YAML

STAGES = ["ingest", "audit", "prepare", "tune", "train", "evaluate", "explain", "stress", "export", "serve", "release", "monitor"]

def cells(nb, kind="code"): return [c | {"source": "".join(c["source"])} for c in json.loads(nb.read_text())["cells"] if c["cell_type"] == kind]

def versions(project):
    "version: (its bundle, its aliases), as MLflow's database has it."
    if not (project / "mlflow.db").is_file(): return {}
    with sqlite3.connect(project / "mlflow.db") as c:
        bundles = dict(c.execute("select version, value from model_version_tags where key = 'bundle' and name = 'digits'"))
        aliases = c.execute("select version, alias from registered_model_aliases where name = 'digits'").fetchall()
    return {v: (b, {a for w, a in aliases if w == v}) for v, b in bundles.items()}

# The first run

def test_first_run_releases(finished):
    assert sorted(ran(finished.said["repro"])) == sorted(STAGES)
    assert "Released: digits" in finished.said["repro"] and "champion and challenger" in finished.said["repro"] and "Report: " in finished.said["repro"] and "reports/index.html" in finished.said["repro"]
    for s in STAGES:
        for ext in ("ipynb", "html"): assert (finished / f"reports/{s}.{ext}").stat().st_size > 2000
    verdict = finished.json("reports/metrics/verdict.json")
    assert verdict["released"] and all(c["met"] for c in verdict["criteria"].values())
    assert finished.json("reports/metrics/evaluate.json")["accuracy"] >= 0.97
    assert finished.json("reports/metrics/serve.json")["agreement"] == finished.json("reports/metrics/export.json")["agreement"] == 1
    trained = finished.json("reports/measurements/train.json")
    assert trained["seconds"] > 0 and 0 < trained["waiting_share"] < 1 and "waiting for images" in (finished / "reports/measurements/train.html").read_text()
    assert not {"seconds", "waiting_share"} & set(finished.json("reports/metrics/train.json"))
    assert {"calm_is_calm": True, "fault_is_flagged": True}.items() <= finished.json("reports/metrics/monitor.json").items()
    assert list(versions(finished).values()) == [(verdict["bundle"], {"champion", "challenger"})]
    assert finished.strays() == [] and finished.processes() == []

def test_reports_show_the_values_they_ran_with(finished):
    params = YAML(typ="safe").load(finished / "params.yaml")
    for s in STAGES:
        injected, = [c["source"] for c in cells(finished / f"reports/{s}.ipynb") if "injected-parameters" in c["metadata"].get("tags", [])]
        exec(injected, shown := {})
        assert {k: shown[k] for k in params[s]} == params[s]
        assert "The values it ran with" in (finished / f"reports/{s}.html").read_text()

def test_results_name_no_folder_of_this_machine(finished):
    "What is in DVC's cache is the same wherever the project lies."
    here = [str(p).encode() for p in (finished.root, finished.root.resolve(), BIN.parent, os.path.expanduser("~"), "/tmp/", ".mlkit/aside")]
    found = [(f, h.decode()) for f in finished.outputs() for h in here if h in (finished / f).read_bytes()]
    assert found == []

# Nothing twice

def test_second_run_does_nothing_and_says_so(project):
    before = {p: ((project / p).stat().st_mtime_ns, h) for p, h in project.outputs().items()}
    project.mlkit("repro") # the clone lies elsewhere: DVC hashes all of it once
    done = project.mlkit("repro")
    assert ran(done.stdout) == [] and "nothing to run" in done.stdout and "Released" in done.stdout
    assert {p: ((project / p).stat().st_mtime_ns, h) for p, h in project.outputs().items()} == before
    assert "Running stage" not in (plain := project.dvc("repro").stdout) and "up to date" in plain
    assert "up to date" in project.dvc("status").stdout
    assert project.git("status", "--short").stdout == "" # dvc.lock and champion.json included

def test_source_and_generated_files_are_in_step(project):
    for command in (["mlkit", "render"], ["nbdev-export"], ["nbdev-clean"]): project.run(*command)
    assert project.git("status", "--short").stdout == ""

# What a change reruns

def stale(project):
    "The stages that DVC would run, those only downstream of them left out, and why: {stage: its changed dependencies}."
    changed = json.loads(project.dvc("status", "--json").stdout)
    return {s: sorted(p if isinstance(p, str) else str(p) for e in entries if isinstance(e, dict) for p in e.get("changed deps", {})) for s, entries in changed.items()}

def edit(project, nb, old, new, kind="code"):
    "Change a cell as JupyterLab would, and export."
    doc = json.loads((project / nb).read_text())
    hit, = [c for c in doc["cells"] if c["cell_type"] == kind and old in "".join(c["source"]) and (kind == "markdown" or "#| export" in "".join(c["source"]))]
    hit["source"] = "".join(hit["source"]).replace(old, new, 1).splitlines(keepends=True)
    (project / nb).write_text(json.dumps(doc, indent=1, ensure_ascii=False) + "\n")
    project.run("nbdev-export")

def test_prose_and_tests_rerun_nothing(project):
    for path in library_notebooks(project.root):
        doc = json.loads(path.read_text())
        prose = next(c for c in doc["cells"] if c["cell_type"] == "markdown")
        prose["source"] = ["".join(prose["source"]) + "\nMore prose."]
        doc["cells"].append({"cell_type": "code", "execution_count": None, "id": "0badcafe", "metadata": {}, "outputs": [], "source": ["assert 1 + 1 == 2"]})
        path.write_text(json.dumps(doc, indent=1, ensure_ascii=False) + "\n")
    project.run("nbdev-export")
    assert project.git("status", "--short", "mlkit").stdout == "" and len(project.git("status", "--short", "nbs").stdout.splitlines()) > 60
    assert stale(project) == {}

def test_changed_function_reruns_who_uses_it(project):
    "`train` and `tune`, which trains in its trials; then what is downstream of them, as far as what they write has changed."
    edit(project, "nbs/training/03_augment.ipynb", 'mode="replicate"', 'mode="constant"')
    assert stale(project) == {s: ["mlkit/training/augment.py"] for s in ("stress", "train", "tune")}
    assert project.git("status", "--short", "mlkit").stdout.split() == ["M", "mlkit/training/augment.py"]

def test_what_depends_on_what(finished):
    "A module stands in dvc.yaml under just the stages that import it, directly or through another."
    deps = {n: {d for d in s["deps"] if d.startswith("mlkit/")} for n, s in finished.stages.items()}
    def users(module): return {n for n, d in deps.items() if f"mlkit/{module}.py" in d}
    assert users("training/fit") == users("training/run") == {"tune", "train", "stress"} and users("training/track") == {"train"}
    assert users("evaluation/explain") == {"explain"} and users("evaluation/evaluate") == {"evaluate", "stress"} and users("sources/registry") == {"ingest"}
    assert users("audit/base") == {"audit"} and users("triton_server/load") == {"serve", "release"} and users("flow/stage") == {*STAGES, "index"}
    assert not users("cli") | users("flow/runner") | users("_modidx") | users("commands/repro") and users("flow/pipeline") == {"index", "release"}
    # and the same from Python itself: no module of mlkit is loaded that is not declared
    code = """
import json, sys
from mlkit.flow.notebook import code_cells
done = set(sys.modules)
for c in code_cells(sys.argv[1]):
    for line in c["source"].splitlines():
        if line.lstrip().startswith(("import ", "from ")): exec(line.strip())
print(json.dumps(sorted(m.replace(".", "/") + ".py" for m, module in sys.modules.items() if m.startswith("mlkit.") and not hasattr(module, "__path__"))))"""
    for s in ("ingest", "tune", "train", "export"):
        loaded = set(json.loads(finished.run(sys.executable, "-c", code, f"nbs/stages/{s}.ipynb").stdout)) - {"mlkit/flow/notebook.py"} # of the line above
        assert loaded <= deps[s], f"{s}: {loaded - deps[s]} is missing in dvc.yaml"

def test_param_reruns_its_stage_and_going_back_restores(project):
    before = project.outputs()
    project.param(explain__n_ordinary=4, explain__method={"n_steps": 8})
    assert stale(project) == {"explain": ["params.yaml"]}
    assert ran(project.mlkit("repro").stdout) == ["explain", "release", "monitor"] # its metrics changed, so the card in the bundle did
    changed = {p for p, h in project.outputs().items() if before[p] != h}
    assert {"data/explained.json", "reports/explain.ipynb", "reports/explain.html", "reports/metrics/explain.json"} <= changed
    follows = "explain", "release", "models/bundle", "ml_test_score" # the card and the score name what was explained
    assert all(any(word in p for word in follows) for p in changed), changed
    project.git("checkout", "params.yaml")
    done = project.mlkit("repro")
    assert ran(done.stdout) == [] and project.outputs() == before # from the cache, reports too

def test_another_version_of_a_package(project):
    "Only the stage that imports it runs again, and what follows from its results."
    was = version("captum")
    info = Path(shutil.copytree(distribution("captum")._path, project / "captum-0.0.1.dist-info")) # the project's folder comes first on the path
    (info / "METADATA").write_text((info / "METADATA").read_text().replace(f"Version: {was}", "Version: 0.0.1"))
    assert project.mlkit("why", "explain").stdout == f"captum: was 'captum {was}', is 'captum 0.0.1'\n"
    assert stale(project) == {"explain": ["environment.json"]} and project.git("diff", "--stat").stdout.count("|") == 1
    assert ran(project.mlkit("repro").stdout) == ["explain"] # its metrics are the same, so the rest stands
    shutil.rmtree(info)
    assert ran(project.mlkit("repro").stdout) == [] # from the cache

# Branches

def test_branches_that_changed_different_stages_merge(project):
    project.mlkit("setup")
    project.commit()
    for branch, values in (("a", {"explain__n_wrong": 5}), ("b", {"monitor__alpha": 0.002})):
        project.git("checkout", "-q", "-b", branch, "master" if project.git("branch", "--list", "master").stdout else "main")
        project.param(**values)
        project.mlkit("repro", rc=None)
        project.commit()
    assert "CONFLICT" not in project.git("merge", "a").stdout
    lock = YAML(typ="safe").load(project / "dvc.lock")["stages"]
    assert lock["explain"]["params"]["params.yaml"]["explain"]["n_wrong"] == 5 and lock["monitor"]["params"]["params.yaml"]["monitor"]["alpha"] == 0.002
    assert "index" not in lock # both made it, neither from what is here now
    assert ran(project.mlkit("repro").stdout) == [] # both had run somewhere
    assert project.git("status", "--short").stdout.split() == ["M", "dvc.lock"]

# DVC's own commands

def test_dvc_experiments_metrics_plots(project):
    done = project.dvc("exp", "run", "train", "-S", "train.n_epochs=1", "-S", "train.optimizer.lr=0.001", "-n", "quick")
    assert ran(done.stdout) == ["tune", "train"] and project.json("reports/metrics/train.json")["epochs"] == 1 # what tune would search has changed
    diff = json.loads(project.dvc("metrics", "diff", "--json").stdout)
    assert diff["reports/metrics/train.json"]["epochs"] == {"old": 30, "new": 1, "diff": -29}
    assert diff["reports/metrics/train.json"]["validation_accuracy"]["diff"] < 0
    shown = project.dvc("metrics", "show").stdout
    assert all(f"reports/metrics/{s}.json" in shown for s in STAGES if s != "release") and "verdict.json" in shown
    for command in (["plots", "show"], ["plots", "diff", "HEAD"]):
        project.dvc(*command, "-o", "plots_page")
        page = (project / "plots_page/index.html").read_text()
        assert all(w in page for w in ("validation_loss", "validation_score", "predicted", "actual")), command
        shutil.rmtree(project / "plots_page")
    dag = project.dvc("dag", "--mermaid").stdout
    assert dag.count('["') == len(STAGES) + 1 and "train" in project.dvc("dag").stdout
    assert "quick" in project.dvc("exp", "show", "--csv").stdout
    runs = "select count(*) from runs r join experiments e using (experiment_id) where r.name not like 'release %'"
    with sqlite3.connect(project / "mlflow.db") as c: n = c.execute(runs).fetchone()[0]
    project.dvc("exp", "run", "--temp", "train", "-S", "train.n_epochs=2", "-n", "aside") # runs in a folder under .dvc/tmp
    with sqlite3.connect(project / "mlflow.db") as c:
        assert c.execute(runs).fetchone()[0] == n + 1 and c.execute("select count(*) from params where key = 'n_epochs' and value = '2'").fetchone()[0] == 1
    assert project.json("reports/metrics/train.json")["epochs"] == 1 # the workspace is as it was
    project.dvc("exp", "apply", "aside")
    assert project.json("reports/metrics/train.json")["epochs"] == 2

def test_plain_papermill_runs_small_and_aside(project):
    before = project.outputs()
    project.run("papermill", "--no-progress-bar", "nbs/stages/train.ipynb", project.root.parent / "out.ipynb")
    assert project.outputs() == before and (project / "scratch/train/models/model.safetensors").is_file()
    assert json.loads((project / "scratch/train/reports/metrics/train.json").read_text())["epochs"] == 3
    assert project.git("status", "--short").stdout == "" and "epoch   3/3" in json.dumps(cells(project.root.parent / "out.ipynb"))

def test_what_a_search_found_is_trained_and_said(project):
    "The number of epochs too; a page says where each value comes from."
    (project / "models/tuned.json").write_text(json.dumps({"n_epochs": 2, "optimizer.lr": 0.02, "keep": "best"}))
    project.run("papermill", "--no-progress-bar", "nbs/stages/train.ipynb", project.root.parent / "found.ipynb")
    page = json.dumps(cells(project.root.parent / "found.ipynb"))
    assert "found by tune: n_epochs 2 (params.yaml: 3), optimizer.lr 0.02" in page and "epoch   2/2" in page and "kept: epoch" in page
    assert json.loads((project / "scratch/train/reports/metrics/train.json").read_text())["epochs"] == 2

# Release and registry

def test_registry_is_restored(project):
    bundle = project.json("reports/metrics/verdict.json")["bundle"]
    for f in project.root.glob("mlflow.db*"): f.unlink()
    shutil.rmtree(project / "mlartifacts")
    done = project.mlkit("repro")
    assert ran(done.stdout) == [] and "champion and challenger" in done.stdout and "already" not in done.stdout
    assert list(versions(project).values()) == [(bundle, {"champion", "challenger"})]
    assert "already" in project.mlkit("repro").stdout and len(versions(project)) == 1
    # what the registry gives is what was put in
    code = "from mlkit.registry.store import fetch; from pathlib import Path; print(fetch('digits', 'champion', Path('scratch/fetched')))"
    folder = project.run(sys.executable, "-c", code).stdout.strip()
    assert sha256(project / folder / "model.safetensors") == sha256(project / "models/model.safetensors")

def test_worse_becomes_challenger_only(project):
    for f in project.root.glob("mlflow.db*"): f.unlink()
    champion = {k: v for k, v in project.json("champion.json").items() if k != "history"} | {"bundle": "0" * 64, "value": 0.9999}
    def begin(champion): # as a project from before there was a history
        (project / "history.jsonl").unlink()
        (project / "champion.json").write_text(json.dumps(champion))
    begin(champion)
    out = project.mlkit("release").stdout
    assert "challenger; the champion stays 000000000000" in out
    assert [a for _, a in versions(project).values()] == [{"challenger"}] and project.json("champion.json").items() >= champion.items()
    begin(champion | {"value": 0.5}) # a low figure on record; but nobody can ask that bundle, so a person decides
    out = project.mlkit("release").stdout
    assert "its bundle 000000000000 is not in this registry" in out and "challenger; the champion stays 000000000000" in out
    project.mlkit("promote", "1", "--to", "champion")
    assert [a for _, a in versions(project).values()] == [{"champion", "challenger"}] and project.json("champion.json")["value"] > 0.97

def test_refused_release_is_not_published(project):
    for f in [*project.root.glob("mlflow.db*"), project / "champion.json", project / "history.jsonl"]: f.unlink()
    yaml = YAML()
    params = yaml.load(project / "params.yaml")
    params["release"]["criteria"]["evaluate.accuracy"]["min"] = 1.01
    yaml.dump(params, project / "params.yaml")
    done = project.mlkit("repro", rc=4)
    assert ran(done.stdout) == ["release", "monitor"] and "Not released: digits" in done.stdout and "evaluate.accuracy" in done.stdout.split("Not released")[-1] and "≥ 1.01" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    verdict, page = project.json("reports/metrics/verdict.json"), (project / "reports/index.html").read_text()
    assert not verdict["released"] and [n for n, c in verdict["criteria"].items() if not c["met"]] == ["evaluate.accuracy"]
    assert ">Not released</h1>" in page and "Not met: evaluate.accuracy" in page
    assert versions(project) == {} and not (project / "champion.json").exists()
    assert project.mlkit("release", rc=4).stdout.startswith("Not released") and versions(project) == {}
    assert project.mlkit("repro", rc=4).stdout.count("Not released") == 1 # a second look does not make it better

def test_a_blank_in_the_path(finished, tmp_path):
    "Triton's Python backend cuts its command line at blanks."
    project = finished.clone(tmp_path / "my project")
    project.mlkit("run", "serve")
    assert project.json("reports/metrics/serve.json")["agreement"] == 1

# What is measured

def measured(project): return {p.name: p.read_bytes() for p in (project / "reports/measurements").iterdir()}

@pytest.mark.parametrize("command", [["mlkit", "repro"], ["dvc", "repro"]])
def test_what_was_measured_elsewhere_is_measured_again(project, command):
    "A clone with DVC's outputs: nothing to run. The release needs the milliseconds, so only then the server is started."
    project.mlkit("repro") # the clone lies elsewhere: DVC hashes all of it once
    shutil.rmtree(project / "reports/measurements")
    shutil.rmtree(project / ".mlkit/measured")
    made = project.outputs("serve")
    assert ran(project.mlkit("repro").stdout) == [] and not (project / "reports/measurements").exists()
    project.replace("params.yaml", "{min: 0.97}", "{min: 0.96}")
    said = project.run(*command).stdout
    assert "'serve' measures again" in said and (command[0] == "dvc" or ran(said) == ["release", "monitor"])
    assert set(measured(project)) == {"serve.json", "serve.ipynb", "serve.html", "verdict.json"} and project.outputs("serve") == made
    assert project.json("reports/metrics/verdict.json")["released"] and project.git("status", "--porcelain").stdout.split() == ["M", "dvc.lock", "M", "params.yaml", "M", "reports/metrics/verdict.json"]

def test_measurements_of_other_values_are_not_shown(project):
    project.mlkit("repro")
    before = measured(project)
    project.param(serve__concurrency=[2])
    assert ran(project.mlkit("repro").stdout) == ["serve", "release"] and measured(project)["serve.json"] != before["serve.json"]
    project.param(serve__concurrency=[1, 4])
    assert "serve" in project.mlkit("repro").stdout and set(measured(project)) == {f"{s}.{ext}" for s in ("export", "train") for ext in ("json", "ipynb", "html")} # restored
    project.mlkit("run", "release")
    assert set(measured(project)) == set(before)
