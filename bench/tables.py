"""mlkit's choice of a model against usual defaults, on public tables that come inside PyPI packages.

    nice python bench/tables.py --state STATE [--seeds 0 1 2] [--only diamonds ames] [--models mlkit lightgbm]
    python bench/tables.py --state STATE --report

Every model gets the same rows of the same table: 70 % to learn from, 15 % to choose by, 15 % to be judged on. Rows are
drawn by class, or by group where rows belong together. What needs no validation rows learns from these too. Each fit is
a process of its own on one thread; it leaves a JSON and its predictions in STATE, so a run that was cut goes on where it
was. The report is Markdown. Peers are installed by pip into an environment in STATE, which sees the packages of this one.
"""
import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from table_sets import PACKAGES, TABLES, Table, rows_of

PEERS = ("lightgbm==4.7.0", "flaml==2.7.0", *PACKAGES)
LIBRARIES = "scikit-learn", "lightgbm", "xgboost-cpu", "flaml", "pandas", "numpy", "torch"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"), "1")
BUDGET = 60 # seconds of CPU for FLAML
SPLITS = "train", "validation", "test"


# The rows

def split_rows(frame, table: Table, seed: int) -> np.ndarray: # (n,) 0: train, 1: validation, 2: test
    "70, 15 and 15 %: by group, by class, or at random."
    from sklearn.model_selection import GroupShuffleSplit, train_test_split
    at = np.arange(len(frame))
    split = np.zeros(len(frame), np.int8)
    for part, share in ((2, 0.15), (1, 0.15 / 0.85)):
        left = at[split == 0]
        if table.group:
            divide = GroupShuffleSplit(1, test_size=share, random_state=seed)
            taken = left[next(divide.split(left, groups=frame[table.group].iloc[left]))[1]]
        else:
            by = frame[table.target].iloc[left] if table.kind != "regression" else None
            taken = train_test_split(left, test_size=share, random_state=seed, stratify=by)[1]
        split[taken] = part
    return split

@dataclass(frozen=True)
class Problem:
    "A table, split."
    table: Table
    folder: Path
    split: np.ndarray # (n,)
    seed: int

    @property
    def frame(self):
        "All rows."
        import pandas as pd
        return pd.read_parquet(self.folder / "rows.parquet")

    @property
    def classes(self) -> list[str]:
        "In the order of the columns of an answer."
        return sorted(self.frame[self.table.target].unique())

    def y(self) -> np.ndarray: # (n,) numbers of classes, or values
        "The truth."
        target = self.frame[self.table.target]
        if self.table.kind == "regression":
            return target.to_numpy(np.float64)
        return np.searchsorted(self.classes, target.to_numpy(object).astype(str))

    def groups(self) -> np.ndarray | None: # (n,) numbers
        "Which rows belong together."
        group = self.table.group
        return self.frame[group].factorize()[0] if group else None

def problem(name: str, state: Path, seed: int) -> Problem:
    "Write the rows and the split, or read what is there."
    table, folder = TABLES[name], state / f"seed-{seed}" / name
    if not (folder / "split.npy").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        frame = rows_of(table)
        frame.to_parquet(folder / "rows.parquet")
        frame.to_csv(folder / "rows.csv", index=False)
        np.save(folder / "split.npy", split_rows(frame, table, seed))
    return Problem(table, folder, np.load(folder / "split.npy"), seed)


# What the defaults read

def features(p: Problem):
    "Numbers, and categories as pandas has them; a date gives its parts. Categories are those of the learned rows."
    import pandas as pd
    frame = p.frame.drop(columns=[c for c in (p.table.target, p.table.group) if c])
    found = {}
    for name, values in frame.items():
        if pd.api.types.is_datetime64_any_dtype(values):
            parts = {part: getattr(values.dt, part) for part in ("year", "month", "day", "dayofweek", "hour")}
            found |= {f"{name} {part}": v.astype(float) for part, v in parts.items()}
            found[f"{name} days"] = (values - pd.Timestamp(0)) / pd.Timedelta(days=1)
        elif pd.api.types.is_numeric_dtype(values):
            found[name] = values.astype(float)
        else:
            words = values.astype(object).where(values.notna(), None)
            known = sorted(words[p.split < 2].dropna().astype(str).unique())
            found[name] = pd.Categorical(words.map(str, na_action="ignore"), categories=known)
    return pd.DataFrame(found)

def at_most(X, learned: np.ndarray, n: int = 254):
    "Categories beyond the most frequent become one, since HistGradientBoosting takes 255."
    import pandas as pd
    found = {}
    for name, values in X.select_dtypes("category").items():
        kept = values[learned].value_counts().index[:n]
        if len(values.cat.categories) > n:
            words = values.astype(object)
            words = words.where(words.isin(kept) | words.isna(), "(other)")
            found[name] = pd.Categorical(words, categories=[*sorted(kept), "(other)"])
    return X.assign(**found)


# The models: each learns from (X, y), and answers for X_test

SKLEARN = "sklearn.compose", "sklearn.ensemble", "sklearn.linear_model", "sklearn.pipeline", "sklearn.preprocessing"
IMPORTS = {"linear": SKLEARN, "hist_gradient_boosting": SKLEARN, "lightgbm": ("lightgbm",), "xgboost": ("xgboost",),
           "flaml": ("flaml", "lightgbm", "xgboost", *SKLEARN),
           "mlkit": ("mlkit.candidates.choose", "mlkit.sources.registry", "torch", "lightning_fabric", "xgboost",
                     *SKLEARN)}
MODELS: dict[str, Callable] = {} # name: function of a problem that gives the answers on its test rows

def model(f: Callable) -> Callable:
    "Register a model under the name of its function."
    MODELS[f.__name__] = f
    return f

def answers(fitted, X, kind: str) -> np.ndarray: # (n, classes) or (n,)
    "Probabilities, or values."
    return fitted.predict(X) if kind == "regression" else fitted.predict_proba(X)

def plain(p: Problem, estimator, X) -> np.ndarray:
    "Learn from the training and the validation rows; answer for the test rows."
    learned, tested = p.split < 2, p.split == 2
    estimator.fit(X[learned], p.y()[learned])
    return answers(estimator, X[tested], p.table.kind)

@model
def linear(p: Problem) -> np.ndarray:
    "Logistic regression or ridge: standardised numbers with the mean and a mark for what is missing."
    from sklearn.compose import make_column_selector, make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler
    numbers = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler())
    words = OneHotEncoder(handle_unknown="ignore")
    of = make_column_selector
    columns = make_column_transformer((numbers, of(dtype_include="number")), (words, of(dtype_include="category")))
    last = Ridge() if p.table.kind == "regression" else LogisticRegression(max_iter=1000)
    return plain(p, make_pipeline(columns, last), features(p))

@model
def hist_gradient_boosting(p: Problem) -> np.ndarray:
    "scikit-learn's defaults, with its native categories."
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    made = HistGradientBoostingRegressor if p.table.kind == "regression" else HistGradientBoostingClassifier
    return plain(p, made(random_state=p.seed), at_most(features(p), p.split < 2))

@model
def lightgbm(p: Problem) -> np.ndarray:
    "LightGBM's defaults, with its native categories."
    from lightgbm import LGBMClassifier, LGBMRegressor
    made = LGBMRegressor if p.table.kind == "regression" else LGBMClassifier
    X = features(p)
    X.columns = [f"x{i}" for i in range(X.shape[1])] # it refuses some characters in names
    return plain(p, made(random_state=p.seed, n_jobs=1, verbose=-1), X)

@model
def xgboost(p: Problem) -> np.ndarray:
    "XGBoost's defaults, with its native categories."
    from xgboost import XGBClassifier, XGBRegressor
    made = XGBRegressor if p.table.kind == "regression" else XGBClassifier
    X = features(p)
    X.columns = [f"x{i}" for i in range(X.shape[1])]
    return plain(p, made(random_state=p.seed, n_jobs=1, enable_categorical=True), X)

@model
def flaml(p: Problem) -> np.ndarray:
    "FLAML with 60 s of CPU: it reads the clock of the process, so a busy machine takes nothing from it."
    from flaml import AutoML
    time.time = time.process_time
    learned, tested = p.split < 2, p.split == 2
    X, y = features(p), p.y()
    X.columns = [f"x{i}" for i in range(X.shape[1])]
    metric = {"binary": "roc_auc", "classes": "log_loss", "regression": "rmse"}[p.table.kind]
    task = "regression" if p.table.kind == "regression" else "classification"
    grouped = {"split_type": "group", "groups": p.groups()[learned]} if p.table.group else {}
    found = AutoML()
    found.fit(X[learned], y[learned], task=task, metric=metric, time_budget=BUDGET, n_jobs=1, seed=p.seed, verbose=0,
              **grouped)
    print("flaml chose", found.best_estimator)
    return answers(found, X[tested], p.table.kind)


# mlkit, by the functions that its stages call

@dataclass(frozen=True)
class GivenSplit:
    "The split of all models, in the place of the one that mlkit would make."
    split: np.ndarray # (n,)
    golden: tuple = ()

    def apply(self, parts, contract):
        "See `mlkit.data.split.Split`."
        import polars as pl
        names = pl.Series("_split", np.array(SPLITS)[self.split])
        known = pl.LazyFrame({"_row": pl.Series(np.arange(1, len(names) + 1)), "_split": names})
        rows = parts.lazy().join(known, on="_row", how="left", maintain_order="left")
        counts = rows.group_by("_split").len().collect()
        return rows, dict(counts.iter_rows())

def ingested(p: Problem, folder: Path):
    "What `ingest` and `prepare` make of the CSV. Raises `ValueError` where it is another task, or other rows."
    import polars as pl
    from mlkit.inputs.rows import Rows
    from mlkit.project.roles import Roles, with_roles
    from mlkit.sources.registry import open_source
    from mlkit.task import Task, save_task
    shards, prepared = folder / "shards", folder / "prepared"
    source = open_source(str(p.folder / "rows.csv"), folder)
    contract = Rows.ingest(source, shards, None, p.table.target).contract
    contract = with_roles(contract, Roles(group=p.table.group)) if p.table.group else contract
    wanted = "regression" if p.table.kind == "regression" else "classification"
    if contract.task != wanted:
        raise ValueError(f"{p.table.name}: mlkit takes it for {contract.task}")
    rows, target, *_ = Rows.prepare(shards, contract, prepared, GivenSplit(p.split))
    save_task(Task(rows, target), prepared)
    for number, part in enumerate(SPLITS):
        found = pl.read_parquet(prepared / f"{part}.parquet")["_row"].to_numpy() - 1
        if not np.array_equal(found, np.flatnonzero(p.split == number)):
            raise ValueError(f"{p.table.name}: the {part} rows are not those of the others")
    return prepared

WATCHED = {"binary": "roc_auc", "classes": "log_loss", "regression": "rmse"} # FLAML is told the same
FIXED = {"schedule": {"name": "one_cycle"}, "augment": None, "loss": {}, "batch_size": None, "device": "cpu",
         "precision": "32-true", "n_threads": 1}

def contest(p: Problem, prepared: Path): # the contest, and the data that it is about
    "What the stage `train` does with the values that `mlkit new` writes."
    from mlkit.candidates.base import prepared_data
    from mlkit.candidates.choose import candidate_specs, contest_of
    from mlkit.candidates.network import network
    from mlkit.new import row_training
    from mlkit.task import load_task
    task = load_task(prepared)
    chosen = {k: c.value for k, c in row_training(int((p.split == 0).sum())).items()}
    values = FIXED | {"seed": p.seed} | chosen
    data = prepared_data(task, prepared, p.seed, 1)
    start = time.perf_counter()
    first = network(data, values), time.perf_counter() - start
    return contest_of(candidate_specs(None, task), data, WATCHED[p.table.kind], first,
                      lambda part: network(part, values), mixed=p.table.group is None), data

def answered(p: Problem, fitted, prepared: Path) -> np.ndarray: # as of `answers`, in the order of the classes
    "What a candidate says of the test rows."
    from mlkit.evaluation.evaluate import predict
    said = predict(fitted.net, fitted.task, fitted.task.input.stored(prepared, "test"))
    if p.table.kind == "regression":
        return said[:, 0]
    return said[:, [fitted.task.target.classes.index(c) for c in p.classes]]

@model
def mlkit(p: Problem) -> np.ndarray:
    "`ingest`, `prepare` and `train`: the candidates, and the one that is chosen on held-out rows."
    import tempfile
    from mlkit.candidates.choose import fit_again, proper_loss, winner
    time.perf_counter = time.process_time # seconds of a candidate are CPU time
    with tempfile.TemporaryDirectory(prefix="tables-") as folder:
        start = cpu_seconds()
        prepared = ingested(p, Path(folder))
        until = cpu_seconds()
        found, data = contest(p, prepared)
        chosen, why = winner(found)
        found = fit_again(found, chosen, data)
        said = {name: answered(p, e.fitted, prepared) for name, e in found.entries.items()}
    EXTRA.update(chosen=chosen, why=why, prepare_cpu_s=round(until - start, 2), blend_p=found.blend_p, candidates={
        name: {"seconds": round(e.seconds, 2), "held_out_loss": proper_loss(found, name), "note": e.fitted.note}
        for name, e in found.entries.items()})
    np.savez(p.folder / "mlkit-candidates.npz", **said)
    print(f"mlkit chose {chosen}")
    return said[chosen]


# One fit

def cpu_seconds() -> float:
    "Of this process and of its children that have ended."
    return sum(os.times()[:4])

def fit_one(name: str, state: Path, seed: int, key: str):
    "Fit a model on a table, in this process; leave its answers and what they cost."
    warnings.filterwarnings("ignore")
    for module in ("pandas", *IMPORTS.get(key, ())):
        importlib.import_module(module) # what it costs is no time of a fit
    p = problem(name, state, seed)
    start, begun = cpu_seconds(), time.monotonic()
    found = np.asarray(MODELS[key](p), np.float64)
    cost = {"cpu_s": round(cpu_seconds() - start, 2), "wall_s": round(time.monotonic() - begun, 2)}
    if len(found) != (p.split == 2).sum() or not np.isfinite(found).all():
        wanted = (p.split == 2).sum()
        raise ValueError(f"{key} on {name}: {len(found)} answers for {wanted} rows, or some are not finite")
    np.save(p.folder / f"{key}.npy", found)
    write_aside(p.folder / f"{key}.json", {"machine": machine(), **cost, **EXTRA})

EXTRA: dict = {} # what a model says beside its answers

def write_aside(path: Path, value: dict):
    "Appears whole."
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value, indent=1))
    aside.rename(path)

def machine() -> str:
    "What figures are worth nothing without."
    def of(package):
        try:
            return f"{package} {version(package)}"
        except ImportError:
            return ""
    return ", ".join(filter(None, [platform.machine(), f"{os.cpu_count()} cores", f"Python {platform.python_version()}",
                                   *map(of, LIBRARIES)]))

def environment(state: Path) -> Path: # its Python
    "An environment with the peers, which sees the packages of this one."
    folder, wanted = state / "peers", "\n".join(PEERS)
    python, ready = folder / "bin/python", folder / "ready"
    if ready.is_file() and ready.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "main.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *PEERS], check=True)
    ready.write_text(wanted)
    return python

def fit_all(state: Path, names: list[str], keys: list[str], seeds: list[int]):
    "What is not there yet, one at a time."
    python, here = environment(state), Path(__file__).resolve()
    paths = os.pathsep.join([str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | ONE_THREAD | {"PYTHONPATH": paths, "PYTHONHASHSEED": "0"}
    for seed, key, name in ((s, k, n) for s in seeds for k in keys for n in names):
        done = state / f"seed-{seed}" / name / f"{key}.json"
        if done.is_file():
            continue
        command = [python, here, "--state", state, "--fit", name, key, str(seed)]
        ended = subprocess.run(command, env=env, capture_output=True, text=True)
        said = (ended.stderr if ended.returncode else ended.stdout).strip().splitlines()[-1:]
        failed = "failed: " if ended.returncode else ""
        print(f"seed {seed}  {key:24} {name:12} {failed}{' '.join(said)[:300]}", flush=True)


# Scores

DEFAULTS = "linear", "hist_gradient_boosting", "lightgbm", "xgboost" # fitted by hand, each in one line
OURS, AUTOML = "mlkit", "flaml"
TITLES = {"linear": "linear", "hist_gradient_boosting": "HistGB", "lightgbm": "LightGBM", "xgboost": "XGBoost",
          "flaml": "FLAML 60 s", "mlkit": "mlkit"}
N_RESAMPLES = 2000
METRIC = {"binary": "AUC", "classes": "log loss", "regression": "R2"}

def losses(kind: str) -> Callable: # of answers, truth and weights (b, n): (b,), lower is better
    "What models are ranked by."
    from mlkit.targets.classes import log_loss, roc_area
    from mlkit.targets.value import rmse
    if kind == "binary":
        return lambda p, y, w: 1 - roc_area(p[:, 1], y == 1, w)
    return log_loss if kind == "classes" else lambda p, y, w: rmse(p.reshape(-1, 1), y, w)

def shown(kind: str, loss, y: np.ndarray): # as `loss`
    "The figure that people read: AUC, log loss, R2."
    if kind == "binary":
        return 1 - loss
    return loss if kind == "classes" else 1 - loss**2 / y.var()

def signed(kind: str, ours, best): # as these
    "By how much our figure is better."
    return best - ours if kind == "classes" else ours - best

@dataclass
class Judged:
    "What the models reached on one split of one table."
    table: Table
    loss: dict[str, float] # model: loss
    score: dict[str, float] # model: AUC, log loss or R2
    cost: dict[str, dict] # model: what its JSON says
    lead: np.ndarray | None = None # (resamples,) of mlkit's figure over the best default's; above 0: better

    @property
    def best(self) -> str:
        "The best single default, on the test rows themselves: the hardest that can be asked."
        return min((k for k in DEFAULTS if k in self.loss), key=self.loss.get)

def weights_of(p: Problem, seed: int = 0): # (b, n) at a time
    "How often each test row is in a resample; rows that belong together are drawn together."
    from mlkit.targets.resample import draws
    tested = p.split == 2
    groups = p.groups()
    of = np.unique(groups[tested], return_inverse=True)[1] if groups is not None else np.arange(tested.sum())
    for w in draws(int(of.max()) + 1, seed, N_RESAMPLES):
        yield w[:, of]

def judged(p: Problem, keys: list[str]) -> Judged:
    "Score what is there; the lead is drawn by a paired bootstrap of the test rows."
    f, y = losses(p.table.kind), p.y()[p.split == 2]
    there = [k for k in keys if (p.folder / f"{k}.json").is_file()]
    answer = {k: np.load(p.folder / f"{k}.npy") for k in there}
    loss = {k: float(f(a, y, np.ones((1, len(y))))[0]) for k, a in answer.items()}
    score = {k: shown(p.table.kind, v, y) for k, v in loss.items()}
    found = Judged(p.table, loss, score, {k: json.loads((p.folder / f"{k}.json").read_text()) for k in there})
    if OURS in there and set(DEFAULTS) & set(there):
        ours, best = answer[OURS], answer[found.best]
        of = [[shown(p.table.kind, f(a, y, w), y) for a in (ours, best)] for w in weights_of(p)]
        found.lead = signed(p.table.kind, *(np.concatenate(drawn) for drawn in zip(*of)))
    return found

def holm(p: dict[str, float]) -> dict[str, float]:
    "Corrected for the number of tables (Holm 1979)."
    found, largest = {}, 0.0
    for i, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (len(p) - i)))
        found[name] = largest
    return found


# The report

def row(*cells) -> str:
    "A row of Markdown."
    return "| " + " | ".join(map(str, cells)) + " |"

def head(*cells) -> list[str]:
    "The head of a table."
    return [row(*cells), "|" + "---|" * len(cells)]

def written_p(p: float) -> str:
    "Never 0."
    return "< 0.001" if p < 0.001 else f"{p:.3f}"

def tables_report(problems: list[Problem]) -> list[str]:
    "What the tables are."
    lines = head("table", "package", "rows", "columns", "target", "covers", "left out")
    for p in problems:
        t, frame = p.table, p.frame
        why = {}
        for column, reason in t.drop.items():
            why.setdefault(reason, []).append(column)
        left = "; ".join(f"{', '.join(columns)}: {reason}" for reason, columns in why.items())
        n_columns = frame.shape[1] - 1 - (t.group is not None)
        grouped = f", by `{t.group}`" if t.group else ""
        lines.append(row(t.name, t.package, f"{len(frame):,}{grouped}", n_columns, f"{t.target}, {t.kind}",
                         ", ".join(t.covers), left))
    return lines

def lead_cells(j: Judged, corrected: float) -> list[str]:
    "By how much mlkit is better than the best default, its interval, and the tests."
    from mlkit.targets.resample import interval, p_values
    low, high = interval(j.lead, 0.95)
    lead = signed(j.table.kind, j.score[OURS], j.score[j.best])
    better, worse = p_values(j.lead)
    return [f"{lead:+.4f} ({low:+.4f} to {high:+.4f})", written_p(worse), written_p(corrected), written_p(better)]

def scores_report(found: dict[str, Judged], keys: list[str]) -> list[str]:
    "A row a table; the best score of a row is bold."
    from mlkit.targets.resample import p_values
    lines = head("table", "figure", *(TITLES[k] for k in keys), "best default", "mlkit is better by (95 %)",
                 "p, worse", "corrected", "p, better")
    corrected = holm({n: p_values(j.lead)[1] for n, j in found.items() if j.lead is not None})
    for name, j in ((n, j) for n, j in found.items() if j.loss):
        first = min(j.loss.values())
        cells = [f"{j.score[k]:.4f}" if k in j.score else "" for k in keys]
        cells = [f"**{c}**" if j.loss.get(k) == first else c for c, k in zip(cells, keys)]
        last = lead_cells(j, corrected[name]) if name in corrected else [""] * 4
        lines.append(row(name, METRIC[j.table.kind], *cells, TITLES[j.best], *last))
    worse = [n for n, p in corrected.items() if p < 0.05]
    said = ", ".join(worse) if worse else "none"
    many = f"5 %, corrected for {len(corrected)} tables"
    return [*lines, "", f"Significantly worse than the best default ({many}): {said}."]

def ranks(found: dict[str, Judged], keys: list[str]) -> np.ndarray: # (tables, models)
    "1 is best; equal ones share their ranks."
    from scipy.stats import rankdata
    return np.array([rankdata([j.loss[k] for k in keys]) for j in found.values()])

def summary_report(by_seed: dict[int, dict[str, Judged]], keys: list[str]) -> list[str]:
    "A row a model: mean rank of each repeat, how often first, CPU seconds."
    whole = {s: {n: j for n, j in found.items() if all(k in j.loss for k in keys)} for s, found in by_seed.items()}
    whole = {s: tables for s, tables in whole.items() if tables}
    if not whole:
        return []
    lines = head("model", *(f"mean rank, split {s}" for s in whole), "first on", "CPU s, median", "CPU s, all tables")
    found = {s: ranks(tables, keys) for s, tables in whole.items()}
    for i, k in enumerate(keys):
        cpu = [j.cost[k]["cpu_s"] for j in whole[min(whole)].values()]
        first = ", ".join(str(int((r[:, i] == 1).sum())) for r in found.values())
        lines.append(row(TITLES[k], *(f"{r[:, i].mean():.2f}" for r in found.values()), first,
                         f"{np.median(cpu):.1f}", f"{sum(cpu):.0f}"))
    counted = ", ".join(f"split {s}: {len(t)}" for s, t in whole.items())
    return [*lines, "", f"Tables with all models: {counted}."]

def candidates_report(found: dict[str, Judged]) -> list[str]:
    "What mlkit chose, and what its candidates cost."
    lines = head("table", "chosen", "candidates: CPU s to fit once", "CPU s in all", "times")
    total = np.zeros(2)
    for name, j in ((n, j) for n, j in found.items() if OURS in j.cost):
        told = j.cost[OURS]
        single = {k: c["seconds"] for k, c in told["candidates"].items() if k != "blend"}
        cost = np.array([sum(single.values()), told["cpu_s"]])
        total += cost
        shown = ", ".join(f"{k} {v:.1f}" for k, v in single.items())
        blended = told["candidates"].get("blend", {}).get("note")
        chosen = f"blend: {blended}" if told["chosen"] == "blend" else told["chosen"]
        lines.append(row(name, chosen, shown, f"{cost[1]:.1f}", f"{cost[1] / cost[0]:.1f}"))
    once, whole = total
    return [*lines, row("**all**", "", f"{once:.0f}", f"{whole:.0f}", f"{whole / max(once, 0.01):.1f}")]

def report(state: Path, names: list[str], keys: list[str], seeds: list[int]) -> str:
    "Markdown."
    problems = {s: [problem(n, state, s) for n in names] for s in seeds}
    by_seed = {s: {p.table.name: judged(p, keys) for p in found} for s, found in problems.items()}
    first = by_seed[seeds[0]]
    said = {c["machine"] for j in first.values() for c in j.cost.values()}
    lines = [*sorted(said), f"{len(seeds)} split(s)", "", *tables_report(problems[seeds[0]]), "",
             *scores_report(first, keys), "", *summary_report(by_seed, keys), ""]
    if any(AUTOML not in j.loss for j in first.values()): # it takes a minute a table, so it may be behind
        lines += [*summary_report(by_seed, [k for k in keys if k != AUTOML]), ""]
    lines += candidates_report(first)
    return "\n".join(lines)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--state", type=Path, required=True, help="A folder of results; what is there is not fitted again.")
    args.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE")
    args.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    args.add_argument("--seeds", nargs="+", type=int, default=[0], help="Of the split; each is a repeat.")
    args.add_argument("--report", action="store_true", help="Fit nothing; print the tables.")
    args.add_argument("--fit", nargs=3, metavar=("TABLE", "MODEL", "SEED"), help=argparse.SUPPRESS)
    a = args.parse_args()
    if a.fit:
        name, key, seed = a.fit
        return fit_one(name, a.state, int(seed), key)
    if not a.report:
        fit_all(a.state.absolute(), a.only, a.models, a.seeds)
    print(report(a.state.absolute(), a.only, list(MODELS), a.seeds))

if __name__ == "__main__":
    main()
