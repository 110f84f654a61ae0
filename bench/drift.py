"""Drift: how fast a table is compared, whether faults are found and named, and how often calm windows alarm.

Usage: python bench/drift.py [--rows 1000000] [--columns 20] [--evidently-rows 100000] [--seeds 20] [--cases 100]. Evidently compares the
same rows in the same run, with its preset's usual tests; it is given fewer, since it keeps rows where mlkit keeps counts. CPU time is that of
the process. Prints three tables in Markdown.
"""
import argparse
import math
import os
import platform
import time
import warnings
from importlib.metadata import version
from statistics import median

import numpy as np
import polars as pl
import psutil

from mlkit.data.contract import Contract, Feature
from mlkit.inputs.columns import Category, Number
from mlkit.inputs.rows import Rows
from mlkit.monitoring.profile import answers_frame, fit_profile, see
from mlkit.monitoring.replay import with_replay
from mlkit.monitoring.shift import false_alarms, shifts
from mlkit.monitoring.sketch import fit_shape, sketch
from mlkit.monitoring.why import judge
from mlkit.targets.classes import Classes
from mlkit.task import Task


def machine() -> str:
    packages = ", ".join(f"{p} {version(p)}" for p in ("polars", "numpy", "scipy", "evidently"))
    return f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, Python {platform.python_version()}, {packages}"

def columns(n: int, k: int, seed: int) -> pl.DataFrame:
    "A fifth of the columns are classes."
    r = np.random.default_rng(seed)
    return pl.DataFrame({f"c{i}": r.choice(["a", "b", "c", "d"], n) if i % 5 == 4 else r.lognormal(size=n) if i % 2 else r.normal(size=n) for i in range(k)})

def timed(work, times: int = 3):
    "Result; seconds of wall and CPU time, the middle of some."
    spent = []
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        spent.append((time.perf_counter() - wall, time.process_time() - cpu))
    return result, *(median(s) for s in zip(*spent)), max(s[0] for s in spent) - min(s[0] for s in spent)

def evidently(before: pl.DataFrame, now: pl.DataFrame) -> set[str]:
    "The columns that its preset calls drifted."
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset
    classes = [c for c, t in before.schema.items() if t == pl.String]
    definition = DataDefinition(numerical_columns=[c for c in before.columns if c not in classes], categorical_columns=classes)
    a, b = (Dataset.from_pandas(f.to_pandas(), data_definition=definition) for f in (before, now))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        tests = Report([DataDriftPreset()], include_tests=True).run(b, a).dict()["tests"]
    return {t["metric_config"]["params"]["column"] for t in tests if t["status"] == "FAIL" and t["metric_config"]["params"].get("column")}

def speed(rows: int, k: int, few: int):
    before, now = columns(rows, k, 0), columns(rows, k, 1)
    shapes = {c: fit_shape(before[c]) for c in before.columns}
    reference = sketch(shapes, before)
    def ours(): return shifts(shapes, reference, sketch(shapes, now))
    found, wall, cpu, spread = timed(ours)
    kept = len(str(reference.to_dict())) / 1e3
    _, other, other_cpu, other_spread = timed(lambda: evidently(before[:few], now[:few]), 1)
    _, small, small_cpu, _ = timed(lambda: shifts(shapes, reference, sketch(shapes, now[:few])))
    print(f"| | rows | wall s | CPU s | spread s | keeps |\n|---|---|---|---|---|---|\n| mlkit | {rows:,} | {wall:.2f} | {cpu:.2f} | {spread:.2f} | {kept:.0f} kB |\n"
          f"| mlkit | {few:,} | {small:.2f} | {small_cpu:.2f} | | {kept:.0f} kB |\n| Evidently | {few:,} | {other:.2f} | {other_cpu:.2f} | {other_spread:.2f} | the rows |\n")
    print(f"On {few:,} rows {other_cpu / small_cpu:.0f} times less CPU time. Memory of this process at most {psutil.Process().memory_info().rss / 2**20:.0f} MB with both tables; drifted: {sum(s.drifted for s in found.values())}.\n")


BUYERS = Task(Rows((Number("age", "float64", fill=40.0), Number("income", "float64"), Number("visits", "float64"), Category("town", "category", values=("Bonn", "Ulm", "Cologne")))),
              Classes("left", ("no", "yes")))
CONTRACT = Contract(task="classification", target=Feature(name="left", dtype="category", categories=("no", "yes")),
                    inputs=tuple(Feature(name=c.name, dtype=c.dtype, nullable=True) for c in BUYERS.input.columns))

def customers(n: int, seed: int, age: float = 42) -> pl.DataFrame:
    r = np.random.default_rng(seed)
    return pl.DataFrame({"age": r.normal(age, 12, n), "income": r.lognormal(10, 0.4, n), "visits": r.poisson(4, n).astype(float), "town": r.choice(["Bonn", "Ulm", "Cologne"], n)})

def model(frame: pl.DataFrame) -> np.ndarray:
    yes = 1 / (1 + np.exp(-(frame["age"].fill_null(42).to_numpy() - 42) / 6 + 0.5 * (frame["visits"].fill_null(4).to_numpy() - 4)))
    return np.column_stack([1 - yes, yes])

def truth(frame: pl.DataFrame, seed: int, moved: float = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(len(frame)) < model(frame.with_columns(pl.col("age") - moved))[:, 1]).astype(int)

def some(column: str, share: float, value) -> pl.Expr:
    return pl.when((pl.int_range(pl.len()) * 0.618034 % 1) < share).then(value).otherwise(pl.col(column)).alias(column)

def kinds(seed: int) -> dict: # what is right: what was sent, what is true, and what else a window shows
    r = np.random.default_rng(seed)
    rows = customers(1000, 1000 + seed)
    factor = float(r.choice([1000, 100, 10, 12, 60, 2.54, 2.20462, 1 / 1000, 1 / 100, 1 / 12]))
    hard = customers(6000, 2000 + seed).filter((pl.col("age") - 42).abs() < 4)[:1000]
    return {
        ("covariate", "age"): (customers(1000, 1000 + seed, age=42 + float(r.choice([-1, 1])) * r.uniform(5, 15)), None, {}),
        ("unit", "income"): (rows.with_columns(pl.col("income") * factor), None, {}),
        ("missing", "visits"): (rows.with_columns(some("visits", r.uniform(0.05, 0.6), None)), None, {}),
        ("category", "town"): (rows.with_columns(some("town", r.uniform(0.04, 0.3), pl.lit("Kiel"))), None, {}),
        ("schema", "town"): (rows.drop("town"), None, {}),
        ("concept", None): (rows, truth(rows, seed, moved=float(r.uniform(8, 16))), {}),
        ("covariate", "age", "quality"): (hard, truth(hard, seed), {}),
        ("feedback", None): (rows, truth(rows, seed), {"own": 900, "own_agree": 870, "others": 120, "others_agree": int(r.uniform(70, 100))}),
        ("skew", None): (rows, truth(rows, seed), {"replayed": 500, "otherwise": int(r.uniform(10, 200))}),
        None: (rows, truth(rows, seed), {"replayed": 500, "otherwise": 0})}

def named(seeds: int):
    "The main finding of each window: the first alarm, else the first that is worth a look."
    held = customers(4000, 1)
    profile = fit_profile(BUYERS, customers(20_000, 0), held, model(held), truth(held, 0))
    right, wrong = {}, {}
    for seed in range(seeds):
        for what, (sent, y, replay) in kinds(seed).items():
            seen = see(profile, BUYERS, CONTRACT, sent.hstack(answers_frame(BUYERS, model(sent), y)))
            found = sorted(judge(profile, BUYERS, with_replay(seen, replay)).findings, key=lambda f: f.severity)
            main = next(((f.what, f.column) for f in found), None)
            if what and what[2:]: # and something that follows from it
                main = main and (*main, *({f.what for f in found if f.severity == "alert"} & {what[2]}))
            right[what] = right.get(what, 0) + (main == what)
            if main != what:
                wrong.setdefault(what, []).append(main)
    print("| what happened | named right | named otherwise |\n|---|---|---|")
    for what, n in right.items():
        print(f"| {'nothing' if what is None else ' '.join(filter(None, what))} | {n} of {seeds} | {', '.join(map(str, wrong.get(what, [])))} |")
    print(f"\nAll: {sum(right.values()) / (seeds * len(right)):.1%} of {seeds * len(right)}.\n")

def same_verdict(cases: int):
    "Columns that were shifted on purpose, and such as were not: do both say the same?"
    before, same, caught, theirs, false = columns(10_000, 10, 0), 0, 0, 0, 0
    shapes = {c: fit_shape(before[c]) for c in before.columns}
    reference = sketch(shapes, before)
    for i in range(cases):
        r, now, c = np.random.default_rng(i), columns(2000, 10, 100 + i), f"c{i % 10}"
        if i % 10 % 5 == 4:
            now = now.with_columns(some(c, r.uniform(0.2, 0.5), pl.lit("a")))
        else:
            now = now.with_columns(pl.col(c) * float(r.choice([1, 1.6])) + float(r.uniform(0.5, 1)))
        ours = {c for c, s in shifts(shapes, reference, sketch(shapes, now)).items() if s.drifted}
        other = evidently(before, now)
        same += (c in ours) == (c in other)
        caught, theirs, false = caught + (c in ours), theirs + (c in other), false + bool(ours - {c})
    print(f"Of {cases} shifted columns mlkit flags {caught}, Evidently {theirs}; both say the same of {same}. In {false} of {cases} windows mlkit flags another column too.\n")
    print("| rows of a window | calm windows that alarm, tests alone | with an effect of 0.1 |\n|---|---|---|")
    for n in (100, 300, 1000, 10_000):
        print(f"| {n:,} | {false_alarms(shapes, reference, n, 400, effect=0.0):.1%} | {false_alarms(shapes, reference, n, 400):.1%} |")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 1_000_000), ("columns", 20), ("evidently-rows", 100_000), ("seeds", 20), ("cases", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    print(f"{machine()}; load {math.floor(os.getloadavg()[0])}\n")
    speed(args.rows, args.columns, args.evidently_rows)
    named(args.seeds)
    same_verdict(args.cases)

if __name__ == "__main__":
    main()
