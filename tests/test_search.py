"A search that is killed goes on; several workers lose no trial and run none twice."
import os, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest
from conftest import few, wait_for

from mlkit.core import ConfigError
from mlkit.search.study import Plan, Store, search
from mlkit.search.space import Range, read_axis

class Slow:
    "A training of three epochs that notes each that it begins."
    def __init__(self, folder): self.folder = Path(folder)

    def __call__(self, values):
        (self.folder / f"{time.time_ns()}.{os.getpid()}").write_text(repr(values["optimizer.lr"]))
        for epoch in (1, 2, 3):
            time.sleep(0.05)
            yield {"epoch": epoch, "score": values["optimizer.lr"]}

def plan(sampler, n=10):
    space = {"optimizer.lr": Range(1e-4, 1.0, True, None, False)}
    return Plan(space, {"optimizer": {"lr": 0.1}}, "score", n, 3, sampler, "none")

def run(folder, sampler, workers):
    (folder / "begun").mkdir(parents=True, exist_ok=True)
    return search(Slow(folder / "begun"), plan(sampler), Store(str(folder / "s.journal"), "s"), int(workers))

def started(folder, sampler, workers):
    code = "import sys, test_search as t; from pathlib import Path; t.run(Path(sys.argv[1]), *sys.argv[2:])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.Popen([sys.executable, "-c", code, folder, sampler, str(workers)], env=env, stdout=subprocess.DEVNULL)

def begun(folder): return list((folder / "begun").glob("*"))

@pytest.mark.parametrize("sampler, workers", [("tpe", 1), ("random", 2)])
def test_killed_search_goes_on(tmp_path, sampler, workers):
    "The same trials and the same best values as without the kill; at most what was running is run again."
    (whole := tmp_path / "whole").mkdir()
    (cut := tmp_path / "cut").mkdir()
    expected = run(whole, sampler, 1)
    p = started(cut, sampler, workers)
    wait_for(lambda: p.poll() is not None or len(begun(cut)) >= 5, "five trials")
    children = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL
    assert run(cut, sampler, workers) == expected
    assert not psutil.wait_procs(children, 30)[1], "a worker has outlived its search"
    assert len(begun(whole)) == 10 and 10 <= len(begun(cut)) <= 10 + workers + 1

def test_a_killed_worker_loses_no_trial(tmp_path):
    p = started(tmp_path, "random", 2)
    wait_for(lambda: p.poll() is not None or len(begun(tmp_path)) >= 3, "three trials")
    os.kill(int(begun(tmp_path)[-1].suffix[1:]), signal.SIGKILL)
    assert p.wait(120) == 0
    _, trials = run(tmp_path, "random", 2) # has all of them, and runs none
    assert [(t["number"], t["state"], t["epochs"]) for t in trials] == [(i, "complete", 3) for i in range(10)]
    assert 10 <= len(begun(tmp_path)) <= 11 and len({f.read_text() for f in begun(tmp_path)}) == 10

@pytest.mark.parametrize("given", few([[1, 0], {"low": 0, "high": 1, "log": True}, ["a"], 3], 4))
def test_wrong_spaces_are_one_line(given):
    with pytest.raises(ConfigError) as e:
        read_axis("optimizer.lr", given)
    assert str(e.value).startswith("tune.space.optimizer.lr: ") and "\n" not in str(e.value)
