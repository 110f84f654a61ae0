"A training in two processes: the losses of one process, and after `kill -9` the same weights to the bit."
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import polars as pl
import psutil
import pytest
import torch
from conftest import FULL, ROOT, one_line, wait_for

from mlkit.core import ConfigError, write_json
from mlkit.inputs.columns import Number
from mlkit.inputs.rows import Rows, save_features
from mlkit.targets.classes import Classes
from mlkit.task import Task
from mlkit.training.checkpoint import Checkpoint
from mlkit.training.launch import plan_of, trained
from mlkit.training.run import Run
from mlkit.training.spread import Plan

TRAIN = {"model": {"name": "residual_mlp", "width": 8, "dropout": 0.0}, "optimizer": {"name": "adamw"}, "schedule": {"name": "one_cycle"},
         "augment": None, "loss": {}, "clip": 0.5, "n_epochs": 3, "batch_size": 16, "keep": "best", "feed": "auto", "device": "cpu",
         "precision": "auto", "n_threads": 1, "seed": 0}
N = 65 # the last batch has one sample, which only one of two processes can have
STEPS = 5 # an epoch
TOLERANCE = 1e-6 # of losses and weights: float32, added up in another order
OPTIONS = {"ddp": {"class_weight": {"b": 3.0}}, "fsdp": {"accumulate": 2}}
DEATHS = {"ddp": ("stops", "tears"), "fsdp": ("tears",)} # each costs a start of all processes

# what a process does on the way: it writes down its steps, stops once and waits for its killer, and once dies inside a save
TASK = """
import os, signal
from pathlib import Path
from mlkit.training import fit
here, rank = Path(__file__).parent, os.environ.get("RANK")

def once(name):
    try: return bool((here / name).touch(exist_ok=False)) or True
    except FileExistsError: return False

def learn(self, *batch, learn=fit.TrainState.learn):
    with open(here / f"steps.{rank}", "a") as f: print(self.epoch, self.step, file=f)
    if rank == "1" and (self.epoch, self.step) == (2, 3) and (here / "stops").exists() and once("stopped"):
        (here / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    learn(self, *batch)
fit.TrainState.learn = learn

def replace(a, b, replace=os.replace): # the first process has written a state, and does not live to give it its name
    steps = (here / "steps.0").read_text().splitlines() if rank == "0" else ()
    if "kept" in str(b) and "2 3" in steps and (here / "tears").exists() and once("torn"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
os.replace = replace
"""

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Two classes, told apart by a number."
    folder, random = tmp_path_factory.mktemp("spread"), np.random.default_rng(0)
    task = Task(Rows((Number("x", "float64", mean=10.0, std=2.0), Number("z", "float64"))), Classes("side", ("a", "b")))
    for split, n in (("train", N), ("validation", 61)):
        x, z = random.normal(10, 2, n), random.normal(0, 1, n)
        side = np.where(x / 2 + z + random.normal(0, 0.5, n) > 5, "b", "a")
        pl.DataFrame({"x": x, "z": z, "side": side}).write_parquet(folder / f"{split}.parquet")
        save_features(folder / f"{split}.safetensors", folder / f"{split}.parquet", task.input, task.target)
    write_json(folder / "task.json", task.to_dict())
    return folder, task

def train(data, root, plan=Plan(), every=0.0, **values):
    "The records and the weights, of a training whose project is `root`."
    folder, task = data
    root.mkdir(exist_ok=True)
    run = Run(TRAIN | values, task, folder, folder, Checkpoint(root / "kept", every))
    records = list(trained(run, plan, folder, folder, root))
    return records, {k: v.clone() for k, v in run.net.state_dict().items()}

def kill_the_stopped(root):
    "From outside, by its number."
    pid = int(wait_for(lambda: (root / "pid").exists() and (root / "pid").read_text(), "a process that stops"))
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it has stopped")
    os.kill(pid, signal.SIGKILL)

def with_task(root, *deaths, more=""):
    root.mkdir()
    (root / "task.py").write_text(TASK + more)
    for death in deaths:
        (root / death).touch()
    return root

def disturbed(data, root, plan, deaths, **values):
    with_task(root, *deaths)
    if "stops" in deaths:
        threading.Thread(target=kill_the_stopped, args=[root], daemon=True).start()
    found = train(data, root, plan, **values)
    assert (root / "torn").exists() and (root / "stopped").exists() == ("stops" in deaths), "nobody has died"
    return found

@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes(data, tmp_path, strategy):
    "The same order and the same losses as in one; after `kill -9`, the same bits; nothing is left."
    plan, values, deaths = Plan(strategy, 2), OPTIONS[strategy], DEATHS[strategy]
    alone, weights = train(data, tmp_path / "alone", **values)
    spread, same = train(data, tmp_path / "spread", plan, **values)
    assert [r["epoch"] for r in spread] == [1, 2, 3]
    for one, two in zip(alone, spread):
        assert one.keys() == two.keys()
        assert max(abs(one[k] - two[k]) for k in one) < TOLERANCE, (one, two)
    assert weights.keys() == same.keys() and max((weights[k] - same[k]).abs().max().item() for k in weights) < TOLERANCE

    killed, again = disturbed(data, tmp_path / "killed", plan, deaths, **values)
    assert killed == spread and all(torch.equal(same[k], again[k]) for k in same)
    for rank in "01":
        steps = (tmp_path / f"killed/steps.{rank}").read_text().splitlines()
        assert sorted(set(steps)) == [f"{epoch} {step}" for epoch in (1, 2, 3) for step in range(STEPS)]
        assert len(steps) <= 3 * STEPS + 2 * len(deaths), f"each death costs one interval, a step here, and the step that was under way: {steps}"
    for root in ("spread", "killed"):
        left = [f.name for f in (tmp_path / root / "kept").iterdir() if not f.name.endswith(".tmp")] # those of the dead are healed by 'mlkit repro'
        assert not left, "what is done is not kept"

FAULTY = """
from mlkit.core import ConfigError
def check(self, *a, check=fit.TrainState.check_loss):
    if self.epoch == 2:
        for f in (here / "kept").rglob("*"): print(f.suffix, file=open(here / f"files.{rank}", "a"))
        raise ConfigError("lower it")
    check(self, *a)
fit.TrainState.check_loss = check
"""

def test_a_fault_of_the_user(data, tmp_path):
    "It is one line, and comes once. By then the state of a network that is cut is made of safetensors and JSON, no pickles."
    root = with_task(tmp_path / "faulty", more=FAULTY)
    with pytest.raises(ConfigError, match="^lower it$"):
        train(data, root, Plan("fsdp", 2))
    suffixes = set((root / "files.0").read_text().split())
    assert ".safetensors" in suffixes and suffixes <= {".safetensors", ".json", ".jsonl", ".tmp"} # .tmp: being written
    assert len((root / "steps.0").read_text().splitlines()) == STEPS + 1, "it was tried again"

DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_spread as t
from mlkit.task import load_task
data = Path({data!r}); t.train((data, load_task(data)), Path({root!r}), t.Plan("ddp", 2))
"""

def test_nobody_outlives_the_stage(data, tmp_path):
    "The stage is killed while a process stands still: torchrun and both processes end with it."
    root = with_task(tmp_path / "orphans", "stops")
    code = DRIVER.format(tests=str(ROOT / "tests"), data=str(data[0]), root=str(root))
    stage = psutil.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (root / "pid").exists() or stage.poll() is not None, "a process that stops")
        family = stage.children(recursive=True)
        assert len(family) >= 3
    finally:
        stage.kill()
        stage.wait()
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert not alive

SRUN = """#!/bin/sh
# Slurm's part, on one machine: the command once a node
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""

def test_two_machines_of_a_job(data, tmp_path, monkeypatch):
    "Two of torchrun's agents, which `srun` starts: what one agent gives. A job of one machine, and `srun` alone, change nothing."
    (srun := tmp_path / "bin/srun").parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}:{os.environ['PATH']}")
    assert plan_of(TRAIN | {"nodes": "auto"}) == Plan()
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = str(s.getsockname()[1])
    job = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_JOB_ID": "7", "MASTER_PORT": port}
    here = {"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"} # where a name of this machine leads nowhere
    for name, value in (job | here).items():
        monkeypatch.setenv(name, value)
    assert plan_of(TRAIN) == Plan(), "one process, as long as nobody asks for more"
    plan = plan_of(TRAIN | {"nodes": "auto"})
    assert plan == Plan("ddp", 1, 2)
    alone, two = (train(data, tmp_path / str(p.nodes), p)[0] for p in (Plan(), plan))
    assert max(abs(a[k] - b[k]) for a, b in zip(alone, two) for k in a) < TOLERANCE

def test_bad_values(fresh, tmp_path):
    "One line that names the key, before the first stage."
    project = fresh.clone(tmp_path / "project")
    project.param(train__devices=4096)
    one_line(project.mlkit("repro", rc=1), "train.devices: 4096")

@pytest.mark.skipif(not FULL, reason="each costs a start of all processes")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled(data, tmp_path, strategy):
    "Steps that are compiled in two processes give what one gives without; the backend calls no C++ compiler."
    (folder, task), root, plan = data, tmp_path / "spread", Plan(strategy, 2)
    _, weights = train(data, tmp_path / "alone")
    root.mkdir()
    (root / "task.py").write_text("from mlkit.training import faster\nfaster.BACKEND = 'aot_eager'\n")
    run = Run(TRAIN | {"compile": True}, task, folder, folder, Checkpoint(root / "kept", 0.0))
    assert len(list(trained(run, plan, folder, folder, root))) == TRAIN["n_epochs"]
    same = run.net.state_dict()
    assert run.clock.compiled > 0 and same.keys() == weights.keys()
    assert max((weights[k] - same[k]).abs().max().item() for k in weights) < TOLERANCE

@pytest.mark.skipif(not FULL or not shutil.which("g++"), reason="compiling takes half a minute")
@pytest.mark.parametrize("values", [{}, {"model": TRAIN["model"] | {"dropout": 0.2}}])
def test_compiled_by_inductor(data, tmp_path, values):
    "What the usual backend makes: without dropout the same weights; interrupted and taken up, the same bits."
    whole, weights = train(data, tmp_path / "whole", compile=True, **values)
    if not values:
        plain = train(data, tmp_path / "plain")[1]
        assert max((weights[k] - plain[k]).abs().max().item() for k in weights) < TOLERANCE
    steps = iter(range(3))
    class Ended(Exception):
        pass
    def save(self, *state, save=Checkpoint.save):
        save(self, *state)
        if next(steps) == 2:
            raise Ended
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Ended):
        patch.setattr(Checkpoint, "save", save)
        train(data, tmp_path / "again", compile=True, **values)
    found, again = train(data, tmp_path / "again", compile=True, **values)
    assert found == whole and all(torch.equal(weights[k], again[k]) for k in weights)
