"An input and a target of somebody else, one file each and no edit of ours: the whole pipeline runs on them. So do a check, a metric, a network."
import re

import pytest
from conftest import ROOT, brief, ran
from test_new import Made

SIGNALS = '''
"Short signals as an input: a modality, its source, a network and a corruption."
from dataclasses import dataclass

import numpy as np, polars as pl
from safetensors.numpy import save_file
from torch import nn

from mlkit.data.contract import Contract, Feature
from mlkit.data.split import SPLITS
from mlkit.inputs.base import CORRUPTIONS, Ingested, Input, modality
from mlkit.sources.base import Source
from mlkit.targets.base import find_target
from mlkit.training.model import MODELS

N = 16

class Waves(Source):
    "Waves that start at some angle."
    modality = "signal"
    def __init__(self, name, root):
        super().__init__(name)
        self.says("400 made-up waves")
    def signals(self):
        r = np.random.default_rng(0)
        angles = r.uniform(0, 360, 400)
        at = np.linspace(0, 2 * np.pi, N, endpoint=False)
        return np.sin(at + np.radians(angles)[:, None]) + r.normal(0, 0.1, (400, N)), angles

@modality
@dataclass(frozen=True)
class Signal(Input):
    scale: float
    modality, unit = "signal", "signal"

    @classmethod
    def ingest(cls, source, out, contract=None, target=None, per_file=None, cache=None):
        X, angles = source.signals()
        out.mkdir(parents=True, exist_ok=True)
        rows = pl.DataFrame({"_row": range(1, len(X) + 1), "_draw": np.random.default_rng(1).random(len(X)), "signal": X.tolist(), "angle": angles})
        rows.write_parquet(out / "part-000000.parquet")
        agreed = Contract(modality="signal", task="direction", inputs=(Feature(name="signal", dtype="float64"),), target=Feature(name="angle", dtype="float64"))
        return Ingested(contract or agreed, [], {"signals": len(X)})

    @classmethod
    def prepare(cls, shards, contract, out, split, *, gain: float = 1.0):
        frame, sizes = split.apply(cls.frame(shards, contract), contract)
        rows = frame.collect()
        target = find_target(contract.task).fit(contract.target, rows.filter(_split="train")["angle"])
        out.mkdir(parents=True, exist_ok=True)
        for s in SPLITS:
            part = rows.filter(_split=s).drop("_split")
            part.write_parquet(out / f"{s}.parquet")
            X = np.array(part["signal"].to_list(), np.float32) * np.float32(gain)
            save_file({"X": X, "y": target.encode(part["angle"])}, out / f"{s}.safetensors")
        return cls(gain), target, sizes, [f"gain {gain:g}"]

    def tensors(self):
        return {"signal": ("float32", (N,))}, ("x", "float32", (N,))

@MODELS
def tiny(signal: Signal, n_outputs: int, *, width: int = 32):
    return nn.Sequential(nn.Linear(N, width), nn.ReLU(), nn.Linear(width, n_outputs))

@CORRUPTIONS
def silence(signal, X, seed):
    return X * np.float32(0.1), []
'''

DIRECTION = '''
"An angle as a target: learned as a point on the circle."
import numpy as np, torch
from torch import nn

from mlkit.targets.base import target
from mlkit.targets.value import Value

class ToDegrees(nn.Module):
    def forward(self, z):
        return torch.rad2deg(torch.atan2(z[:, :1], z[:, 1:])) % 360

@target
class Direction(Value):
    task, n_outputs, score_name = "direction", 2, "r2"
    n_answers = 1
    def as_learned(self, y):
        return np.stack([np.sin(np.radians(y)), np.cos(np.radians(y))], 1).astype(np.float32)
    def loss(self, output, y):
        return nn.functional.mse_loss(output, y)
    def score(self, output, y):
        return 1 - self.loss(output, y).item()
    def answer(self):
        return ToDegrees()
    def difference(self, a, b):
        return np.abs((a.astype(np.float64) - b + 180) % 360 - 180)[:, 0] / self.std
'''

ENTRY_POINTS = """
[mlkit.sources]
waves = toy_signals:Waves
[mlkit.inputs]
signal = toy_signals:Signal
[mlkit.targets]
direction = toy_direction:Direction
[mlkit.models]
tiny = toy_signals:tiny
[mlkit.corruptions]
silence = toy_signals:silence
"""

@pytest.fixture
def toys(tmp_path):
    "A folder on the path that looks like an installed package."
    folder = tmp_path / "installed"
    (info := folder / "mlkit_toys-0.1.dist-info").mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlkit-toys\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "toy_signals.py").write_text(SIGNALS)
    (folder / "toy_direction.py").write_text(DIRECTION)
    return folder

class WithToys(Made):
    @property
    def env(self):
        found = next(d / "installed" for d in (self.root, self.root.parent) if (d / "installed").is_dir())
        return super().env | {"PYTHONPATH": f"{ROOT}:{found}"}

def test_a_toy_input_and_a_toy_target(toys, tmp_path):
    "From `mlkit new` to a verdict; every stage, ONNX and a real server included."
    done = WithToys(tmp_path).run("mlkit", "new", tmp_path / "waves", "--from", "waves")
    assert "400 made-up waves" in done.stdout
    project = WithToys(tmp_path / "waves")
    brief(project).param(train__model={"name": "tiny", "width": 24}, monitor={"fault": {"name": "silence"}}, prepare={"input": {"gain": 0.5}},
                  release__compare="evaluate.r2", release__criteria={"evaluate.r2": {"min": 0.8}, "export.agreement": {"min": 1.0}, "serve.agreement": {"min": 1.0}})
    log = project.mlkit("repro").stdout
    assert set(ran(log)) == {"ingest", "audit", "prepare", "tune", "train", "evaluate", "explain", "stress", "export", "serve", "release", "monitor"}
    assert "Released: waves" in log
    task = project.json("data/prepared/task.json")
    assert (task["modality"], task["input"], task["task"]) == ("signal", {"scale": 0.5}, "direction")
    monitored = project.json("reports/metrics/monitor.json")
    assert monitored["calm_is_calm"] and monitored["fault_is_flagged"]
    assert "up to date" in project.mlkit("repro").stdout
    assert re.search(r"gain 0\.5", (project / "reports/prepare.html").read_text())

CHECK = """
from mlkit.audit.base import Finding, check
@check("rows")
def too_round(data):
    "Targets without a digit after the point."
    yield Finding("warning", 3, "3 rows are too round", "look at them")
"""

def test_own_code_in_the_task_notebook(tmp_path):
    "A check, a metric and a network of `nbs/task.ipynb`; the check and the metric enter the verdict, and only the stages that use them import it."
    import json
    Made(tmp_path).run("mlkit", "new", tmp_path / "dia", "--from", "diabetes")
    project = Made(tmp_path / "dia")
    notebook = project / "nbs/task.ipynb"
    document = json.loads(notebook.read_text())
    document["cells"].append({"cell_type": "code", "execution_count": None, "id": "0badcafe", "metadata": {}, "outputs": [], "source": ["#| export" + CHECK]})
    notebook.write_text(json.dumps(document))
    criteria = {"evaluate.r2": {"min": 0.0}, "evaluate.worst_error": {"max": 1e6}, "audit.too_round": {"max": 0}}
    brief(project).param(train__candidates=["network"], train__model={"name": "log_mlp", "width": 16}, train__n_epochs=2, release__criteria=criteria)
    log = project.mlkit("repro", rc=4).stdout
    assert "nbs/stages/audit.ipynb imports task from now on" in log and "audit.too_round 3 (asked ≤ 0)" in log
    assert "task.py" in project.stages["audit"]["deps"] and "task.py" not in project.stages["ingest"]["deps"]
    assert project.json("reports/metrics/evaluate.json")["worst_error"] > 0
