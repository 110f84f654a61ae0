"Several processes write runs to one SQLite store at once, and nothing is lost."
import multiprocessing

from mlkit.training.store import mlflow_client
from mlkit.training.track import Run

PROCESSES, RUNS, EPOCHS = 8, 10, 5

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
