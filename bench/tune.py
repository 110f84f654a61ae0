"""Search: what ASHA saves, and what a trial costs beside its training.

Usage: python bench/tune.py [--trials 27] [--epochs 27] [--seeds 0 1 2]. Three tasks: the digits, and two tables of scikit-learn. Random draws, the same
ones for every pruner, so that a difference is the pruner's. Compute is counted in epochs that were trained, which no other program on the
machine can change. The cost of a trial is CPU time of the process with a training that does nothing, in turn with Optuna alone.
Prints two tables in Markdown.
"""
import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import optuna
import psutil
from mlkit.flow.config import read_params
from mlkit.search.space import read_space
from mlkit.search.study import Plan, Store, Training, search
from mlkit.task import load_task
from mlkit.training.run import completed
from sklearn.datasets import load_breast_cancer, load_diabetes

SPACE = {"optimizer.lr": {"low": 1e-4, "high": 0.1, "log": True}, "optimizer.weight_decay": {"low": 1e-4, "high": 0.3, "log": True}, "model.dropout": [0.0, 0.5]}
PRUNERS = "none", "asha", "hyperband"
USUAL = {"device": "cpu", "precision": "32-true", "n_threads": 1, "seed": 0, "feed": "auto", "batch_size": None, "keep": "best", "loss": {}, "augment": None,
         "schedule": {"name": "one_cycle"}}


def machine() -> str:
    packages = ", ".join(f"{p} {version(p)}" for p in ("optuna", "torch"))
    return f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, Python {platform.python_version()}, {packages}"

def made(folder: Path, name: str) -> Path: # a project whose data are prepared
    "A project of a data set of scikit-learn, or of the digits that come with mlkit."
    mlkit = [sys.executable, "-c", "from mlkit.cli import main; main()"]
    source = "digits"
    if name != "digits":
        frame = {"cancer": load_breast_cancer, "diabetes": load_diabetes}[name](as_frame=True).frame
        if name == "cancer":
            frame["target"] = frame["target"].map({0: "malignant", 1: "benign"})
        frame.to_csv(folder / f"{name}.csv", index=False)
        source = f"{name}.csv"
    for args in (["new", name, "--from", source], ["repro", "prepare"]):
        subprocess.run([*mlkit, *args], cwd=folder if args[0] == "new" else folder / name, check=True, capture_output=True, timeout=600)
    return folder / name

def searched(project: Path, pruner: str, seed: int, n_trials: int, n_epochs: int, folder: Path) -> list[dict]:
    "The trials of a search."
    prepared, shards = project / "data/prepared", project / "data/shards"
    score = f"validation_{load_task(prepared).target.score_name}"
    train = completed(USUAL | read_params(project)["train"] | {"n_epochs": n_epochs, "keep": "best"})
    train = {k: v for k, v in train.items() if k not in ("candidates", "experiment", "calibrate", "decide", "refit")}
    plan = Plan(read_space(SPACE, train), train, score, n_trials, n_epochs, "random", pruner, seed)
    _, trials = search(Training(train, prepared, shards, score), plan, Store(str(folder / f"{project.name}.{pruner}.{seed}"), "bench"))
    return trials

def until(trials: list[dict], target: float) -> int | None: # None: never
    "Epochs that were trained until a trial reached a score."
    spent = 0
    for t in trials:
        for score in t["curve"]:
            spent += 1
            if score >= target:
                return spent
    return None

def compute_table(args, folder: Path):
    print(f"| task | seed | pruner | epochs trained | less than none | best score | epochs until {args.near:g} below none's best |")
    print("|---|---|---|---|---|---|---|")
    for name in args.tasks:
        project = made(folder, name)
        for seed in args.seeds:
            found = {p: searched(project, p, seed, args.trials, args.epochs, folder) for p in PRUNERS}
            epochs = {p: sum(t["epochs"] for t in trials) for p, trials in found.items()}
            best = {p: max(max(t["curve"], default=-1e9) for t in trials) for p, trials in found.items()}
            for p in PRUNERS:
                print(f"| {name} | {seed} | {p} | {epochs[p]} | {epochs['none'] / epochs[p]:.1f}x | {best[p]:.4f} | {until(found[p], best['none'] - args.near)} |", flush=True)

def quick(values: dict):
    "A training that does nothing."
    for epoch in range(1, 6):
        yield {"epoch": epoch, "score": 1 / (1 + abs(values["a"] - 0.3)) * epoch}

def by_mlkit(folder: Path, n: int):
    space = read_space({"a": [0.0, 1.0], "b": [0.0, 1.0]}, {"a": 0.5, "b": 0.5})
    search(quick, Plan(space, {"a": 0.5, "b": 0.5}, "score", n, 5, "tpe", "asha"), Store(str(folder / "journal"), "cost"))

def by_optuna(folder: Path, n: int, journal: bool):
    def objective(trial):
        values = {"a": trial.suggest_float("a", 0, 1), "b": trial.suggest_float("b", 0, 1)}
        for record in quick(values):
            trial.report(record["score"], record["epoch"])
            if trial.should_prune():
                raise optuna.TrialPruned
        return record["score"]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = optuna.storages.journal.JournalFileBackend(str(folder / "plain"))
    storage = optuna.storages.JournalStorage(file) if journal else None
    study = optuna.create_study(storage=storage, direction="maximize", sampler=optuna.samplers.TPESampler(seed=0),
                                pruner=optuna.pruners.SuccessiveHalvingPruner(reduction_factor=3))
    study.optimize(objective, n_trials=n)

def cost_table(n: int, repeats: int):
    ways = {"mlkit, its journal": by_mlkit, "Optuna, its journal": lambda f, n: by_optuna(f, n, True), "Optuna, in memory": lambda f, n: by_optuna(f, n, False)}
    spent = {way: [] for way in ways}
    for _ in range(repeats):
        for way, work in ways.items():
            with tempfile.TemporaryDirectory() as d, open(os.devnull, "w") as nowhere:
                out, sys.stdout = sys.stdout, nowhere
                start = time.process_time()
                try:
                    work(Path(d), n)
                finally:
                    sys.stdout = out
                spent[way].append(1000 * (time.process_time() - start) / n)
    print(f"\n| way ({n} trials of five epochs that do nothing) | CPU time a trial, median | spread |\n|---|---|---|")
    for way, ms in spent.items():
        print(f"| {way} | {median(ms):.1f} ms | {min(ms):.1f} to {max(ms):.1f} |")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=27)
    parser.add_argument("--epochs", type=int, default=27)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=["digits", "cancer", "diabetes"])
    parser.add_argument("--near", type=float, default=0.002)
    args = parser.parse_args()
    print(machine() + "\n")
    with tempfile.TemporaryDirectory() as d:
        compute_table(args, Path(d))
        cost_table(100, 5)
