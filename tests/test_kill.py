"`kill -9` at any moment: the next run completes, and the model is the same bytes."
import os, random, shutil, signal, sys, time

import pytest
from conftest import FULL, one_line, quick, ran, wait_for
from ruamel.yaml import YAML

def forgotten(project, *stages):
    "As if these stages had never run, and nothing had been published. The others are in DVC's cache."
    for run in [f for f in (project / ".dvc/cache/runs").rglob("*") if f.is_file()]:
        if YAML(typ="safe").load(run)["cmd"].split()[-1] in stages:
            run.unlink() # its folder stays, as where DVC dies between making it and writing the file
    for path in project.outputs(*stages):
        (project / path).unlink()
    for file in [project / "dvc.lock", project / "champion.json", *project.root.glob("mlflow.db*"), *project.root.glob("*.jsonl")]:
        file.unlink()
    shutil.rmtree(project / "mlartifacts")
    return project

def training(project, p): return "epoch   " in p.out.read_text()
def serving(project, p): return project.runs("tritonserver")

MOMENTS = { # of a run, in their order: what is there by then
    "before a stage": lambda project, p: (project / ".mlkit/lock.pid").exists(),
    "a stage begins": lambda project, p: (project / ".mlkit/aside/ingest").exists(),
    "its outputs move": lambda project, p: any((project / f"{folder}reports/prepare.html").exists() for folder in (".mlkit/aside/prepare/", "")),
    "while it learns": training,
    "while it serves": serving,
    "while the model is published": lambda project, p: any((project / "mlartifacts").rglob("*bundle*")),
}

def test_killed_in_every_phase(uninterrupted, tmp_path):
    "The whole group dies in each phase of one run; each next run goes on from there. What was finished does not run again."
    project = forgotten(uninterrupted.clone(tmp_path / "project"), "ingest", "prepare", "train", "serve")
    begun = []
    for moment, there in MOMENTS.items():
        with project.started("mlkit", "repro") as p:
            wait_for(lambda: p.poll() is not None or there(project, p), moment)
            assert p.poll() is None, f"{moment}: it had ended: {p.err.read_text()}"
            os.killpg(p.pid, signal.SIGKILL)
            begun.append(ran(p.out.read_text()))
        assert not project.wait_idle(), f"{moment}: a process has outlived its run"
    done = project.mlkit("repro")
    assert project.apart(uninterrupted) == {}
    assert [begun[0], begun[1], begun[2], begun[4]] == [[], ["ingest"], ["ingest", "prepare"], ["train", "serve"]], "what had run was in no dvc.lock, but in the cache"
    assert begun[3][-1] == "train" and begun[5][0] == "serve", begun
    assert "Released" in done.stdout and "Traceback" not in done.stderr
    assert "up to date" in project.mlkit("repro").stdout and not project.strays()

@pytest.mark.skipif(not FULL, reason="not run: ten kills at random moments; set MLKIT_TEST_FULL=1")
def test_ten_kills(fresh, uninterrupted, tmp_path):
    "The whole group dies, ten times, at random moments of one run; each next run goes on from there."
    project, moment, seen = quick(fresh.clone(tmp_path / "project")), random.Random(0), set()
    for i in range(10):
        with project.started("mlkit", "repro") as p:
            time.sleep(moment.uniform(0.08, 0.2) * uninterrupted.seconds)
            seen |= {l.split()[1] for l in p.out.read_text().splitlines() if l.startswith("▸ ")}
            assert p.is_running(), p.err.read_text()
            os.killpg(p.pid, signal.SIGKILL)
        assert not project.wait_idle(), "a process has outlived its run"
    done = project.mlkit("repro")
    assert len(seen) >= 4, f"the kills hit only {seen}"
    assert "Released" in done.stdout and "Traceback" not in done.stderr
    assert project.apart(uninterrupted) == {}
    assert "up to date" in project.mlkit("repro").stdout and not project.strays()

def test_a_killed_dvc_leaves_nobody(fresh, tmp_path):
    "Plain `dvc repro`, killed alone: what it had started ends by itself."
    project = quick(fresh.clone(tmp_path / "project"))
    with project.started("dvc", "repro") as p:
        wait_for(lambda: (project / ".mlkit/aside/ingest").exists(), "a stage")
        p.send_signal(signal.SIGKILL)
        assert not project.wait_idle()
    assert not [s for s in project.strays() if not s.startswith(".mlkit")]

@pytest.mark.parametrize("rwlock, lock", [('{"read": {"/x', ""), ("", "schema: '2.0'\nstages:\n  ingest:\n    cmd")], ids=["torn, empty", "empty, torn"])
def test_half_written_locks(uninterrupted, tmp_path, rwlock, lock):
    project = uninterrupted.clone(tmp_path / "project")
    (project / ".dvc/tmp").mkdir(exist_ok=True)
    (project / ".dvc/tmp/rwlock").write_text(rwlock)
    (project / "dvc.lock").write_text(lock)
    done = project.mlkit("repro")
    assert all(f"healed: {name} was half-written" in done.stdout for name in (".dvc/tmp/rwlock", "dvc.lock"))
    assert "Released" in done.stdout and ran(done.stdout) == [] # the cache knows it all
    assert project.apart(uninterrupted) == {}

def test_half_made_database(fresh, tmp_path):
    "MLflow takes seconds to make its tables. Killed in the midst of it, the next run makes them anew."
    (tmp_path / "tmp").mkdir()
    client = ["env", f"TMPDIR={tmp_path / 'tmp'}", sys.executable, "-c", f"from mlkit.training.store import mlflow_client; print(mlflow_client('sqlite:///{tmp_path}/mlflow.db').search_experiments()[0].name)"]
    with fresh.started(*client) as p:
        wait_for(lambda: p.poll() is not None or any(f.stat().st_size > 200_000 for f in tmp_path.rglob("mlflow.db")), "half of the tables")
        assert p.poll() is None
        os.killpg(p.pid, signal.SIGKILL)
    assert fresh.run(*client).stdout == "Default\n"

def test_two_at_once(fresh, tmp_path):
    "The second says who holds the project; the first is not disturbed."
    project = quick(fresh.clone(tmp_path / "project"))
    with project.started("mlkit", "repro", "ingest") as p:
        wait_for(lambda: "▸" in p.out.read_text(), "a stage")
        one_line(project.mlkit("repro", rc=1), "another 'mlkit repro'", str(p.pid))
        assert p.wait(300) == 0, p.err.read_text()

def test_several_at_once(uninterrupted, tmp_path):
    "`-j 3` gives what a serial run gives: after `train`, six stages wait for nobody, or for one of them."
    beside = "audit", "evaluate", "explain", "stress", "export", "serve"
    project = forgotten(uninterrupted.clone(tmp_path / "project"), *beside)
    assert sorted(ran(project.mlkit("repro", "-j", "3").stdout)) == sorted(beside)
    assert project.apart(uninterrupted) == {}
