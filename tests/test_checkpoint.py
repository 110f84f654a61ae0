"`kill -9` at twenty moments of one training, inside a save too: at most one interval is lost, and the weights are the same to the bit."
import multiprocessing
import os
import signal
import time

import numpy as np
import polars as pl
import pytest
import torch
from mlkit.inputs.columns import Number
from mlkit.inputs.rows import Rows, save_features
from mlkit.targets.classes import Classes
from mlkit.task import Task
from mlkit.training.checkpoint import Checkpoint, read_state
from mlkit.training.run import Run, train_records

TRAIN = {"model": {"name": "residual_mlp", "width": 32, "n_blocks": 2, "dropout": 0.3}, "optimizer": {"name": "adamw", "lr": 0.01}, "schedule": {"name": "one_cycle"},
         "augment": None, "loss": {}, "n_epochs": 30, "batch_size": 32, "keep": "best", "clip": 1.0, "average": 0.9, "seed": 3, "feed": "auto", "device": "cpu",
         "precision": "32-true", "n_threads": 1}
fork = multiprocessing.get_context("fork") # a child has PyTorch already, so a kill costs a moment and not three seconds


class Told(Checkpoint):
    "Keeps every step, and writes down when a save begins and when it has ended."
    def save(self, tensors, rest):
        self.note("begin", rest)
        super().save(tensors, rest)
        self.note("end", rest)

    def note(self, what, rest):
        with open(self.folder / "told.txt", "a") as f:
            f.write(f"{what} {rest['epoch']} {rest['step']}\n")


def train(prepared, folder, out, kept):
    run = Run(TRAIN, TASK, prepared, prepared, kept and Told(folder / "kept", every=0))
    list(train_records(run))
    torch.save(run.net.state_dict(), out)


TASK = Task(Rows(tuple(Number(c, "float64", 0.0, 0.0, 1.0) for c in "abc")), Classes("y", ("no", "yes")))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("kills"), np.random.default_rng(0)
    for split, n in (("train", 600), ("validation", 200)):
        x = random.normal(size=(n, 3)).round(3)
        y = np.where(x[:, 0] * x[:, 1] + 0.3 * random.normal(size=n) > 0, "yes", "no")
        pl.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "y": y}).write_parquet(folder / f"{split}.parquet")
        save_features(folder / f"{split}.safetensors", folder / f"{split}.parquet", TASK.input, TASK.target)
    return folder


def started(*args):
    p = fork.Process(target=train, args=args)
    p.start()
    return p


def told(folder): # [['begin', epoch, step], ...]
    path = folder / "kept/told.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(what, int(epoch), int(step)) for what, epoch, step in (line.split() for line in lines)]


def test_killed_at_twenty_moments(prepared, tmp_path):
    whole = started(prepared, tmp_path, tmp_path / "whole.pt", False)
    whole.join(120)
    assert whole.exitcode == 0
    random, inside, kept, gone_on = np.random.default_rng(1), 0, [], []
    (tmp_path / "kept").mkdir()
    for _ in range(20):
        seen, p = len(told(tmp_path)), started(prepared, tmp_path, tmp_path / "killed.pt", True)
        until = time.monotonic() + 60
        while len(told(tmp_path)) <= seen + 2 and p.is_alive() and time.monotonic() < until: # it has come a step further
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.04))
        os.kill(p.pid, signal.SIGKILL)
        p.join(60)
        assert p.exitcode == -signal.SIGKILL, "it had ended before it was killed: it should be longer"
        events = told(tmp_path)
        inside += events[-1][0] == "begin"
        gone_on.append(step_of(events[seen]))
        kept.append(step_of([e for e in events if e[0] == "end"][-1]))
    p = started(prepared, tmp_path, tmp_path / "killed.pt", True)
    p.join(120)
    assert p.exitcode == 0 and inside >= 1
    assert all(begin > end for begin, end in zip(gone_on[1:], kept)), "what was kept is not done again"
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "killed.pt"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def step_of(event): return (event[1] - 1) * 19 + event[2] # 600 samples, 32 a step


def test_a_torn_state_is_none(tmp_path):
    "Whatever the file is cut to, it is read whole or not at all."
    kept = Checkpoint(tmp_path, every=0)
    kept.load("a training")
    kept.save({"w": torch.arange(50.0)}, {"epoch": 2})
    whole = kept.path.read_bytes()
    for n in np.linspace(0, len(whole) - 1, 40).astype(int):
        kept.path.write_bytes(whole[:n])
        assert read_state(kept.path, "a training") is None
    kept.path.write_bytes(whole)
    assert read_state(kept.path, "a training")[1] == {"epoch": 2}
