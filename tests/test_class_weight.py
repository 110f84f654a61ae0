"Weights of classes: the same meaning for every candidate, and a slip is found before the first stage."
from pathlib import Path

import numpy as np, polars as pl, pytest, torch
from sklearn.utils.class_weight import compute_class_weight

from mlkit.candidates.base import Data, outputs_of, prepared_data
from mlkit.candidates.choose import as_entry, contest_of, candidate_specs, fit_candidate, fit_again
from mlkit.candidates.network import network
from mlkit.data.prepared import load_split
from mlkit.inputs.columns import Number
from mlkit.inputs.image import Image
from mlkit.inputs.rows import Rows, save_features
from mlkit.targets.classes import Classes
from mlkit.task import Task
from mlkit.training.class_weight import class_weights
from mlkit.training.run import Run, train_records

TRAIN = {"model": {"name": "tabm", "n_members": 4, "width": 16}, "optimizer": {"name": "adamw", "lr": 0.01}, "schedule": {"name": "one_cycle"},
         "augment": None, "loss": {"label_smoothing": 0.01}, "n_epochs": 6, "batch_size": 64, "keep": "best", "metric": "pr_auc", "seed": 0}

def clinic(asked, kind="rows", n=1500):
    "Patients of whom one in ten is ill, which two numbers, or a bright left half, tell only in part."
    random = np.random.default_rng(0)
    def split():
        x = random.normal(size=(n, 2)).astype(np.float32)
        return x, (x[:, 0] + random.normal(size=n) > 1.8).astype(np.int64)
    (train, y), (held, z) = split(), split()
    def shown(x):
        if kind == "rows":
            return x
        images = np.full((n, 8, 8, 1), 100.0) + random.normal(scale=10, size=(n, 8, 8, 1))
        images[:, :, :4] += 30 * x[:, 0][:, None, None, None]
        return images.clip(0, 255).astype(np.uint8)
    X, target = {"train": shown(train), "validation": shown(held)}, Classes("health", ("well", "ill"))
    task = Task(Rows((Number("a", "float64"), Number("b", "float64"))) if kind == "rows" else Image((8, 8, 1), (0.4,), (0.2,)), target)
    return Data(task, lambda task, split: X[split], {"train": y, "validation": z}, class_weights=class_weights(asked, target, y))

CNN = TRAIN | {"model": {"name": "small_cnn", "width": 4}, "optimizer": {"name": "adamw", "lr": 0.005}, "n_epochs": 3}
FIT = {"network": ("rows", lambda data: network(data, TRAIN)), "images": ("image", lambda data: network(data, CNN)),
       "linear": ("rows", lambda data: fit_candidate({"name": "linear"}, data)), "trees": ("rows", lambda data: fit_candidate({"name": "trees"}, data))}

def recall(fitted, data):
    said = outputs_of(fitted.net, fitted.task, data.X("validation", fitted.task)).argmax(1).numpy()
    return (said[data.y["validation"] == 1] == 1).mean()

@pytest.mark.parametrize("name", FIT)
def test_each_candidate_finds_more_of_a_rare_class(name):
    kind, fit = FIT[name]
    plain, even = clinic(None, kind), clinic("balanced", kind)
    counted = compute_class_weight("balanced", classes=np.array([0, 1]), y=plain.y["train"])
    given = clinic(dict(zip(("well", "ill"), counted.tolist())), kind)
    before, after, same = fit(plain), fit(even), fit(given)
    assert recall(after, even) > recall(before, plain) + 0.3
    for a, b in zip(after.net.state_dict().values(), same.net.state_dict().values()):
        assert torch.equal(a, b) # `balanced` is these weights, to the bit
    ones = fit(clinic({"ill": 1.0}, kind))
    assert abs(recall(ones, plain) - recall(before, plain)) < 0.03 # equal weights change nothing but rounding

def test_what_follows_counts_each_sample_once():
    "The temperature, the figures and the winner are of samples that are not weighed; what is fitted again is weighed."
    even, plain, told = clinic("balanced"), clinic(None), []
    contest = contest_of(candidate_specs(["trees", "linear"], even.task), even, "log_loss", None, mixed=False, progress=told.append)
    for name in ("trees", "linear"):
        fitted = fit_candidate({"name": name}, even)
        raw = outputs_of(fitted.net, fitted.task, even.X("validation", fitted.task))
        assert contest.entries[name].fitted.task.target.temperature == as_entry(fitted, raw, plain.y["validation"], 0).fitted.task.target.temperature
    again = fit_again(contest, "linear", even).entries["linear"].fitted
    assert recall(again, even) > recall(fit_candidate({"name": "linear"}, plain), plain) + 0.3

def test_the_stage_and_a_search_train_with_them(tmp_path):
    "`Run` is what both use; the loop of the candidate gives the same weights."
    even = clinic("balanced")
    for split in ("train", "validation"):
        x, y = even.X(split), even.y[split]
        pl.DataFrame({"a": x[:, 0], "b": x[:, 1], "health": np.array(["well", "ill"])[y]}).write_parquet(tmp_path / f"{split}.parquet")
        save_features(tmp_path / f"{split}.safetensors", tmp_path / f"{split}.parquet", even.task.input, even.task.target)
    machine = {"feed": "auto", "device": "cpu", "precision": "32-true", "n_threads": 1}
    run = Run(TRAIN | machine | {"class_weight": "balanced"}, even.task, tmp_path, tmp_path)
    records = list(train_records(run))
    data = prepared_data(even.task, tmp_path, 0, 1, class_weight="balanced")
    assert run.training.class_weights == even.class_weights == data.class_weights
    assert {"validation_accuracy", "validation_pr_auc"} <= records[-1].keys()
    assert np.array_equal(load_split(tmp_path / "train.safetensors")[1], even.y["train"])
    for a, b in zip(run.net.state_dict().values(), network(data, TRAIN).net.state_dict().values()):
        assert torch.equal(a, b)

@pytest.mark.parametrize("asked, says", [
    ({"3": 0}, "the weight of '3' is 0.0; give a number above 0"), ({"3": float("nan")}, "the weight of '3' is nan"),
    ("balance", "give 'balanced', or '{class: weight}'"), ({"eleven": 2}, "no class is called 'eleven'")])
def test_a_slip_is_found_before_the_first_stage(project, asked, says):
    "Names of classes are known from the contract of the last run."
    project.param(train__class_weight=asked)
    done = project.mlkit("repro", rc=1)
    assert says in done.stderr and done.stderr.count("\n") == 1 and "▸" not in done.stdout, done.stderr
    assert "train.class_weight" in done.stderr and Path(project / "reports/train.html").is_file()
