"""Networks for tables beside each other, alone: no trees, no blend. The tables and the splits are those of `tables.py`.

    nice python bench/networks.py --state STATE [--seeds 0 1] [--only concrete jobs]
    python bench/networks.py --state STATE --report

Each learns from the same 70 % of the rows for the same number of epochs, keeps its best epoch by the 15 % to choose by,
is calibrated on these, and is judged on the other 15 %. Each fit is a process of its own on one thread; it leaves a JSON
in STATE, so a run that was cut goes on where it was. The report is Markdown.
"""
import argparse
import json
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

import numpy as np

from table_sets import TABLES
from tables import FIXED, ONE_THREAD, WATCHED, environment, ingested, problem, write_aside

NETWORKS = {
    "before": {"model": {"name": "residual_mlp", "width": 64, "n_blocks": 2, "dropout": 0.2},
               "optimizer": {"name": "adamw", "lr": 0.002, "weight_decay": 0.05}},
    "tabm": {"model": {"name": "tabm"}, "optimizer": {"name": "adamw", "lr": 0.004, "weight_decay": 0.05}},
}
NETWORKS |= {f"{name}, by metric": values | {"metric": True} for name, values in NETWORKS.items()}
FIGURE = {"binary": "roc_auc", "classes": "log_loss", "regression": "r2"}
USUAL = "churn", "credit", "attrition", "spam", "jobs", "leaves", "splice", "storms", "concrete", "ames", "chicago", "wages"

def fit_one(name: str, state: Path, seed: int, key: str):
    "Fit a network on a table, in this process; leave its scores and what it cost."
    import torch
    from mlkit.candidates.base import outputs_of, prepared_data
    from mlkit.candidates.network import network
    from mlkit.data.prepared import load_split
    from mlkit.new import row_training
    from mlkit.task import load_task
    p, values = problem(name, state, seed), dict(NETWORKS[key])
    values |= {"metric": WATCHED[p.table.kind]} if values.pop("metric", False) else {}
    n_epochs = row_training(int((p.split == 0).sum()))["n_epochs"].value
    with tempfile.TemporaryDirectory(prefix="networks-") as folder:
        prepared = ingested(p, Path(folder))
        task = load_task(prepared)
        data = prepared_data(task, prepared, seed, 1)
        begun = os.times()
        fitted = network(data, FIXED | {"seed": seed, "n_epochs": n_epochs, "keep": "best"} | values)
        cpu = sum(os.times()[:2]) - sum(begun[:2])
        held, tested = (outputs_of(fitted.net, task, task.input.stored(prepared, s)) for s in ("validation", "test"))
        y = np.asarray(load_split(prepared / "test.safetensors")[1])
        target = task.target.calibrated(held, data.y["validation"])
    with torch.no_grad():
        p_test = target.exact(target.answer()(tested).numpy())
    scores = {m: float(s.of(p_test, y, np.ones((1, len(y))))[0]) for m, s in target.scores().items()}
    write_aside(place(state, name, seed, key), {"cpu_s": round(cpu, 1), **scores})

def place(state: Path, name: str, seed: int, key: str) -> Path:
    "Of the scores of a fit."
    return state / f"seed-{seed}" / name / f"network-{key.replace(', ', '-').replace(' ', '-')}.json"

def fit_all(state: Path, names: list[str], seeds: list[int]):
    "What is not there yet, one at a time."
    python, here = environment(state), Path(__file__).resolve()
    paths = os.pathsep.join([str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | ONE_THREAD | {"PYTHONPATH": paths, "PYTHONHASHSEED": "0"}
    for seed, name, key in ((s, n, k) for s in seeds for n in names for k in NETWORKS):
        if key.endswith("by metric") and TABLES[name].kind != "binary":
            continue # its metric is its loss
        if not place(state, name, seed, key).is_file():
            command = [python, here, "--state", state, "--fit", name, key, str(seed)]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            print(name, seed, key, "failed: " + done.stderr.strip()[-300:] if done.returncode else "", flush=True)

def report(state: Path, names: list[str], seeds: list[int]):
    "A row a table and split."
    print("| table | figure | split |", " | ".join(f"{k} | CPU s" for k in NETWORKS), "|")
    print("|---" * (3 + 2 * len(NETWORKS)) + "|")
    for name, seed in ((n, s) for n in names for s in seeds):
        figure, cells = FIGURE[TABLES[name].kind], []
        for key in NETWORKS:
            path = place(state, name, seed, key)
            found = json.loads(path.read_text()) if path.is_file() else {}
            cells += [f"{found[figure]:.4f}", f"{found['cpu_s']:.0f}"] if found else ["", ""]
        print(f"| {name} | {figure.replace('_', ' ')} | {seed} |", " | ".join(cells), "|")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", default=list(USUAL))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--fit", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    if asked.fit:
        fit_one(asked.fit[0], asked.state.resolve(), int(asked.fit[2]), asked.fit[1])
    else:
        if not asked.report:
            fit_all(asked.state.resolve(), asked.only, asked.seeds)
        report(asked.state.resolve(), asked.only, asked.seeds)
