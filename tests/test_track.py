"Several processes write runs to one SQLite store at once, and nothing is lost; trackers without a key keep their runs here."
import multiprocessing
import os
import subprocess
import sys
import zipfile

import pytest
from conftest import FULL
from mlkit.training.store import mlflow_client
from mlkit.training.track import Run

PROCESSES, RUNS, EPOCHS = 8, 10 if FULL else 3, 5

def write_runs(uri, k, n):
    for i in range(n):
        with Run("at once", {"by": k, "number": i}, uri, f"{k}.{i}") as run:
            for epoch in range(EPOCHS):
                run.log(epoch, loss=1 / (epoch + 1), score=float(epoch))

def test_processes_at_once_lose_nothing(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow_client(uri)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_runs, args=(uri, k, RUNS)) for k in range(PROCESSES)]
    for p in workers:
        p.start()
    for p in workers:
        p.join(120)
    assert [p.exitcode for p in workers] == [0] * PROCESSES
    experiment = client.get_experiment_by_name("at once").experiment_id
    runs = client.search_runs([experiment], max_results=1000)
    assert {(r.data.params["by"], r.data.params["number"]) for r in runs} == {(str(k), str(i)) for k in range(PROCESSES) for i in range(RUNS)}
    assert len(runs) == PROCESSES * RUNS and {r.info.status for r in runs} == {"FINISHED"}
    histories = [[m.step for m in client.get_metric_history(r.info.run_id, name)] for r in runs for name in ("loss", "score")]
    assert histories == [list(range(EPOCHS))] * (2 * PROCESSES * RUNS)


OFFLINE = """
import sys
from pathlib import Path
from mlkit.training.facts import Facts
from mlkit.training.trackers import About, Told
about = About("digits/a", "small_cnn lr 0.1", {"lr": 0.1, "url": "https://a:s3cret@x/"}, Path(sys.argv[2]), Facts({"git.commit": "ab12"}, note="a note"))
with Told([{"name": sys.argv[1]}], about) as told:
    for step in range(1, 6):
        told.log(step, loss=1 / step, accuracy=step / 8)
    assert list(told.trackers) == [sys.argv[1]]
"""


@pytest.mark.parametrize("name, package", [("wandb", "wandb"), ("comet", "comet_ml")])
def test_without_a_key_a_run_is_kept_here(name, package, tmp_path):
    "Values, metrics and the commit are in the file that is sent later; a secret is not, and nothing is asked."
    pytest.importorskip(package)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "COMET"))} | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    done = subprocess.run([sys.executable, "-c", OFFLINE, name, tmp_path], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "goes on without it" not in done.stdout, done.stdout + done.stderr
    files = [f for f in (tmp_path / ".mlkit").rglob("*") if f.is_file()]
    archive = next(f for f in files if f.suffix in (".wandb", ".zip"))
    kept = zipfile.ZipFile(archive).read("messages.json") if archive.suffix == ".zip" else archive.read_bytes()
    assert all(word in kept for word in (b"small_cnn lr 0.1", b"ab12", b"0.375", b"0.625")) and kept.count(b"loss") >= 5
    assert not [f for f in files if b"s3cret" in f.read_bytes()] and b"s3cret" not in kept
