"Flipped labels, a new truth and harder rows: which batches the audit of `mlkit retrain` sets aside, over many seeds."
import argparse
import time

import numpy as np
import polars as pl

from mlkit.data.contract import Contract, Feature
from mlkit.retraining.suspects import audit_batch

INPUTS = [Feature(name="age", dtype="float64"), Feature(name="calls", dtype="int64"), Feature(name="town", dtype="category", categories=("Rome", "Oslo"))]
TRUTHS = {"same": lambda a, c: 0.08 * (a - 50) + 0.7 * (c - 3), "age turned": lambda a, c: 0.08 * (50 - a) + 0.7 * (c - 3),
          "border moved": lambda a, c: 0.08 * (a - 35) + 0.7 * (c - 3), "calls do not matter": lambda a, c: 0.12 * (a - 50)}


def rows(n, rng, sharp, truth="same", age=(18, 80), value=False):
    a, c = rng.uniform(*age, n), rng.poisson(3, n)
    z = sharp * TRUTHS[truth](a, c)
    frame = pl.DataFrame({"age": a, "calls": c, "town": rng.choice(["Rome", "Oslo"], n)})
    if value:
        return frame.with_columns(left=pl.Series(z + rng.normal(0, 1, n)))
    return frame.with_columns(left=pl.Series(np.where(rng.random(n) < 1 / (1 + np.exp(-z)), "yes", "no")))


def flipped(frame, share, rng):
    which = rng.random(len(frame)) < share
    if frame["left"].dtype == pl.Float64:
        return frame.with_columns(left=pl.Series(np.where(which, -frame["left"].to_numpy() * 3, frame["left"].to_numpy())))
    y = frame["left"].to_numpy()
    return frame.with_columns(left=pl.Series(np.where(which, np.where(y == "yes", "no", "yes"), y)))


def contract(value):
    target = Feature(name="left", dtype="float64") if value else Feature(name="left", dtype="category", categories=("no", "yes"))
    return Contract(task="regression" if value else "classification", inputs=tuple(INPUTS), target=target)


CASES = {"as before": {}, "10 % flipped": {"flip": 0.1}, "20 % flipped": {"flip": 0.2}, "2 % flipped": {"flip": 0.02},
         "age turned": {"truth": "age turned"}, "border moved": {"truth": "border moved"}, "calls do not matter": {"truth": "calls do not matter"},
         "harder rows": {"age": (42, 58)}, "age turned, 10 % flipped": {"truth": "age turned", "flip": 0.1}}


def once(seed, case, n, sharp, value):
    rng = np.random.default_rng(seed)
    known = rows(1500, rng, sharp, value=value)
    batch = rows(n, rng, sharp, case.get("truth", "same"), case.get("age", (18, 80)), value)
    return audit_batch(flipped(batch, case.get("flip", 0), rng), known, contract(value), seed=seed)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--seeds", type=int, default=20)
    p.add_argument("--rows", type=int, nargs="+", default=[300, 1000])
    p.add_argument("--sharp", type=float, nargs="+", default=[1.0, 2.0])
    p.add_argument("--value", action="store_true", help="predict a number")
    args = p.parse_args()
    print("| batch | rows | sharpness | set aside | new truth | seconds each |\n|---|---|---|---|---|---|")
    for sharp in args.sharp:
        for n in args.rows:
            for name, case in CASES.items():
                start = time.monotonic()
                found = [once(seed, case, n, sharp, args.value) for seed in range(args.seeds)]
                aside, new = sum(f.aside.all() for f in found), sum(f.new_truth for f in found)
                print(f"| {name} | {n:,} | {sharp:g} | {aside}/{args.seeds} | {new}/{args.seeds} | {(time.monotonic() - start) / args.seeds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
