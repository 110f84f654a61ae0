"`kill -9` at any moment: the next run completes, and the model is the same bytes."
import os, random, signal, sys, time

import pytest
from conftest import one_line, quick, ran, wait_for

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
    assert project.same == uninterrupted.same
    assert "up to date" in project.mlkit("repro").stdout and not project.strays()

def test_a_killed_dvc_leaves_nobody(fresh, uninterrupted, tmp_path):
    "Plain `dvc repro`, killed alone: what it had started ends by itself."
    project = quick(fresh.clone(tmp_path / "project"))
    with project.started("dvc", "repro") as p:
        wait_for(lambda: any("mlkit" in " ".join(q.cmdline()) and "run" in q.cmdline() for q in project.processes()), "a stage")
        time.sleep(0.1 * uninterrupted.seconds)
        p.send_signal(signal.SIGKILL)
        assert not project.wait_idle()
    assert not [s for s in project.strays() if not s.startswith(".mlkit")]

@pytest.mark.parametrize("file, content", [(".dvc/tmp/rwlock", '{"read": {"/x'), (".dvc/tmp/rwlock", ""), ("dvc.lock", ""), ("dvc.lock", "schema: '2.0'\nstages:\n  ingest:\n    cmd")])
def test_half_written_locks(uninterrupted, tmp_path, file, content):
    project = uninterrupted.clone(tmp_path / "project")
    (project / file).parent.mkdir(exist_ok=True)
    (project / file).write_text(content)
    done = project.mlkit("repro")
    assert "healed: " in done.stdout and "Released" in done.stdout and ran(done.stdout) == [] # the cache knows it all
    assert project.same == uninterrupted.same

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
    with project.started("mlkit", "repro", "prepare") as p:
        wait_for(lambda: "▸" in p.out.read_text(), "a stage")
        one_line(project.mlkit("repro", rc=1), "another 'mlkit repro'", str(p.pid))
        assert p.wait(300) == 0, p.err.read_text()

def test_several_at_once(fresh, uninterrupted, tmp_path):
    "`-j 3` gives what a serial run gives."
    project = quick(fresh.clone(tmp_path / "project"))
    project.mlkit("repro", "-j", "3")
    assert project.same == uninterrupted.same
