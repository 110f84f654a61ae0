"""A table prepared for training: mlkit against pandas, hand-written Polars and DuckDB.

    pip install duckdb
    python bench/prepare.py [--rows 10000000] [--repeats 7]

The same Parquet parts (made here: 6 numbers, a whole number, 2 categories, a target; 5 % of the numbers and 1 % of the targets are missing), the same work: leave out rows
without a target; split by `_draw`, 70 : 15 : 15; write the rows of each split; from the training split's sample (200,000 rows, chosen by `_draw`) fill, mean, standard
deviation and 33 quantiles of every number, from all its rows the categories; write the features of each split as float32: standardised and softly bounded, normal score
(a line through the quantiles), missing or not, code. mlkit writes features as safetensors, the others as Parquet, uncompressed, which is the quickest they have.
Each run is a process of its own; a time counts only if all its rows and features are those of mlkit's. Interleaved: each repeat runs every contender once."""
import argparse, json, os, platform, resource, shutil, statistics, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

NUMBERS, CATEGORIES, SPLITS, EDGES = [*(f"x{i}" for i in range(6)), "k"], ["c", "d"], ("train", "validation", "test"), (0.7, 0.85)
GRID = [i / 32 for i in range(33)]

def make(folder, n, size=1_000_000):
    import numpy as np, polars as pl
    folder.mkdir()
    for i, a in enumerate(range(0, n, size)):
        r, m = np.random.default_rng(i), min(size, n - a)
        x = {f"x{j}": np.where(r.random(m) < 0.05, np.nan, r.lognormal(0, 1, m) if j % 2 else r.normal(j, 2, m)) for j in range(6)}
        words = {c: pl.Series([f"{c}{v}" for v in r.integers(0, k, m)]) for c, k in (("c", 50), ("d", 300))}
        rest = dict(k=pl.Series(r.integers(0, 100, m)), **words, y=pl.when(pl.Series(r.random(m) > 0.01)).then(pl.Series(r.normal(0, 1, m))), _row=pl.Series(np.arange(a + 1, a + m + 1)), _draw=pl.Series(r.random(m)))
        pl.DataFrame(x).fill_nan(None).with_columns(**rest).write_parquet(folder / f"part-{i:06d}.parquet", row_group_size=100_000)

def line(v): # knots and their normal scores
    import numpy as np
    score, tail = statistics.NormalDist().inv_cdf, min(0.05, max(0.001, 5 / len(v)))
    knots, at = np.unique(np.quantile(v, GRID), return_inverse=True)
    scores = np.array([score(min(max(q, tail), 1 - tail)) for q in GRID])
    return knots, np.bincount(at, scores) / np.bincount(at)

def moments(v): # of a number, its missing values left out
    import numpy as np
    return float(np.median(v)), float(v.mean()), float(v.std()), *line(v)

def with_mlkit(data, out):
    from mlkit.data.engines import open_parts
    from mlkit.core import write_json
    from mlkit.data.split import Split
    from mlkit.inputs.rows import prepare_rows
    columns = [*(SimpleNamespace(name=n, dtype="int64" if n == "k" else "float64") for n in NUMBERS), *(SimpleNamespace(name=n, dtype="category") for n in CATEGORIES)]
    contract = SimpleNamespace(task="regression", features=columns, target=SimpleNamespace(name="y", dtype="float64", categories=()), group=None, time=None)
    with open_parts(data, "polars") as parts:
        rows, *_ = prepare_rows(parts, contract, out, Split(dict(zip(SPLITS, (0.7, 0.15, 0.15)))))
    write_json(out / "features.json", rows.features)

def with_pandas(data, out):
    import numpy as np, pandas as pd
    rows = pd.read_parquet(data)
    rows = rows[rows["y"].notna()]
    split = np.array(SPLITS)[np.searchsorted(EDGES, rows["_draw"], side="right")]
    parts = {s: rows[split == s] for s in SPLITS}
    del rows
    train = parts["train"]
    sample = train[(train["_draw"] * 1_000_003.0) % 1.0 < 200_000 / len(train)]
    fitted = {n: moments(sample[n].dropna().to_numpy(np.float64)) for n in NUMBERS}
    lost = {n: bool(train[n].isna().any()) for n in NUMBERS}
    codes = {}
    for c in CATEGORIES:
        counts = train[c].value_counts().rename_axis("v").reset_index(name="n")
        codes[c] = {v: i for i, v in enumerate(counts[counts["n"] >= 5].sort_values(["n", "v"], ascending=[False, True])["v"], 1)}
    for s, part in parts.items():
        part.to_parquet(out / f"{s}.parquet", index=False)
        X = {}
        for n, (fill, mean, std, knots, scores) in fitted.items():
            w = part[n].to_numpy(np.float64); w = np.where(np.isnan(w), fill, w)
            z = np.clip((w - mean) / std, -1e6, 1e6).astype(np.float32)
            X[n], X[f"{n} score"] = z / np.sqrt(1 + (z / 3) ** 2), np.interp(w, knots, scores).astype(np.float32)
            if lost[n]: X[f"{n} missing"] = part[n].isna().to_numpy(np.float32)
        for c in CATEGORIES: X[c] = part[c].map(codes[c]).fillna(0).to_numpy(np.float32)
        pd.DataFrame(X).to_parquet(out / f"{s}.features.parquet", compression=None, index=False)

def with_polars(data, out):
    import numpy as np, polars as pl
    draw = pl.col("_draw")
    rows = pl.scan_parquet(data / "*.parquet").filter(pl.col("y").is_not_null()).collect()
    parts = dict(zip(SPLITS, (rows.filter(draw < EDGES[0]), rows.filter((draw >= EDGES[0]) & (draw < EDGES[1])), rows.filter(draw >= EDGES[1]))))
    del rows
    train = parts["train"]
    sample = train.filter((draw * 1_000_003.0) % 1.0 < 200_000 / len(train))
    fitted = {n: moments(sample[n].drop_nulls().cast(pl.Float64).to_numpy()) for n in NUMBERS}
    lost = {n: train[n].null_count() > 0 for n in NUMBERS}
    codes = {c: train.group_by(c).len().drop_nulls().filter(pl.col("len") >= 5).sort("len", c, descending=[True, False])[c] for c in CATEGORIES}
    made = []
    for n, (fill, mean, std, knots, scores) in fitted.items():
        w = pl.col(n).cast(pl.Float64).fill_null(fill)
        z = ((w - mean) / std).clip(-1e6, 1e6).cast(pl.Float32)
        made += [(z / (1 + (z / 3) ** 2).sqrt()).alias(n), w.map_batches(lambda s, k=knots, f=scores: pl.Series(np.interp(s.to_numpy(), k, f).astype(np.float32)), return_dtype=pl.Float32).alias(f"{n} score")]
        if lost[n]: made.append(pl.col(n).is_null().cast(pl.Float32).alias(f"{n} missing"))
    made += [pl.col(c).replace_strict(codes[c], range(1, len(codes[c]) + 1), default=0, return_dtype=pl.Float32) for c in CATEGORIES]
    for s, part in parts.items():
        part.write_parquet(out / f"{s}.parquet")
        part.select(made).write_parquet(out / f"{s}.features.parquet", compression="uncompressed")

def piece(w, knots, slopes, scores, a, b): # a tree of comparisons that ends in a line
    if b - a == 1: return f"({scores[a]!r} + ({w} - {knots[a]!r}) * {slopes[a]!r})"
    m = (a + b) // 2
    return f"CASE WHEN {w} < {knots[m]!r} THEN {piece(w, knots, slopes, scores, a, m)} ELSE {piece(w, knots, slopes, scores, m, b)} END"

def with_duckdb(data, out):
    import duckdb, numpy as np
    db = duckdb.connect()
    db.execute(f"CREATE TABLE rows AS SELECT * FROM read_parquet('{data}/*.parquet') WHERE y IS NOT NULL")
    where = dict(zip(SPLITS, (f"_draw < {EDGES[0]}", f"_draw >= {EDGES[0]} AND _draw < {EDGES[1]}", f"_draw >= {EDGES[1]}")))
    n = db.execute(f"SELECT count(*) FROM rows WHERE {where['train']}").fetchone()[0]
    sample = db.execute(f"SELECT {', '.join(NUMBERS)} FROM rows WHERE {where['train']} AND (_draw * 1000003.0::DOUBLE) % 1.0::DOUBLE < 200000 / {n}.0::DOUBLE").fetchnumpy()
    lost = dict(zip(NUMBERS, db.execute(f"SELECT {', '.join(f'count(*) > count({x})' for x in NUMBERS)} FROM rows WHERE {where['train']}").fetchone()))
    made = []
    for x in NUMBERS:
        fill, mean, std, knots, scores = moments(np.ma.compressed(sample[x]).astype(np.float64))
        k, f = knots.tolist(), scores.tolist()
        w, slopes = f"coalesce({x}::DOUBLE, {fill!r}::DOUBLE)", (np.diff(scores) / np.diff(knots)).tolist()
        z, inner = f"greatest(least(({w} - {mean!r}::DOUBLE) / {std!r}::DOUBLE, 1e6), -1e6)::FLOAT", f"greatest(least({w}, {k[-1]!r}::DOUBLE), {k[0]!r}::DOUBLE)"
        made += [f'({z} / sqrt(1 + ({z} / 3) * ({z} / 3)))::FLOAT AS "{x}"', f'({piece("w" + x, *[[*map(Number, v)] for v in (k, slopes, f)], 0, len(k) - 1)})::FLOAT AS "{x} score"'.replace("w" + x, inner)]
        if lost[x]: made.append(f'({x} IS NULL)::INT::FLOAT AS "{x} missing"')
    for c in CATEGORIES:
        values = [v for v, in db.execute(f"SELECT {c} FROM rows WHERE {where['train']} AND {c} IS NOT NULL GROUP BY {c} HAVING count(*) >= 5 ORDER BY count(*) DESC, {c}").fetchall()]
        db.execute(f"CREATE TYPE type_{c} AS ENUM ({', '.join(repr(v) for v in values)})")
        made.append(f'coalesce(enum_code(TRY_CAST({c} AS type_{c})) + 1, 0)::FLOAT AS "{c}"')
    for s in SPLITS:
        db.execute(f"COPY (SELECT * FROM rows WHERE {where[s]}) TO '{out}/{s}.parquet' (FORMAT parquet)")
        db.execute(f"COPY (SELECT {', '.join(made)} FROM rows WHERE {where[s]}) TO '{out}/{s}.features.parquet' (FORMAT parquet, COMPRESSION uncompressed)")

class Number(float):
    "A float64 in SQL, where 0.1 would be a decimal."
    def __repr__(self): return f"{float(self)!r}::DOUBLE"

CONTENDERS = {"pandas": with_pandas, "Polars by hand": with_polars, "DuckDB": with_duckdb, "mlkit": with_mlkit}

def one(name, data, out):
    "In its own process. Its packages are imported before the clock starts."
    import numpy, pandas, polars, pyarrow.parquet # noqa: F401
    if name == "DuckDB": import duckdb # noqa: F401
    if name == "mlkit": import mlkit.inputs.rows, mlkit.data.engines # noqa: F401
    begin = time.perf_counter(), time.process_time()
    CONTENDERS[name](data, out)
    print(json.dumps({"seconds": time.perf_counter() - begin[0], "cpu": time.process_time() - begin[1], "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))

def same(out, reference):
    "Raises `AssertionError` where rows or features are not mlkit's."
    import numpy as np, polars as pl
    features = json.loads((reference / "features.json").read_text())
    for s in SPLITS:
        for c in ("_row", "y", *CATEGORIES): assert pl.read_parquet(out / f"{s}.parquet", columns=[c]).equals(pl.read_parquet(reference / f"{s}.parquet", columns=[c])), (s, c)
        with open(reference / f"{s}.safetensors", "rb") as f: head = int.from_bytes(f.read(8), "little"); shape = json.loads(f.read(head))["X"]["shape"]
        X = np.memmap(reference / f"{s}.safetensors", np.float32, "r", 8 + head, tuple(shape))
        for j, name in enumerate(features):
            x = pl.read_parquet(out / f"{s}.features.parquet", columns=[name])[name].to_numpy()
            assert x.dtype == np.float32 and x.shape == (shape[0],) and np.abs(x - X[:, j]).max() < 1e-5, (s, name)

def main():
    p = argparse.ArgumentParser(); p.add_argument("--rows", type=int, default=10_000_000); p.add_argument("--repeats", type=int, default=7); p.add_argument("--one", nargs=3)
    a = p.parse_args()
    if a.one: return one(a.one[0], Path(a.one[1]), Path(a.one[2]))
    seen = {k: [] for k in CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="mlkit-bench-") as tmp:
        data, reference = Path(tmp) / "data", Path(tmp) / "mlkit"
        make(data, a.rows)
        reference.mkdir(); run("mlkit", data, reference)
        for r in range(a.repeats):
            for name in CONTENDERS:
                out = Path(tmp) / "out"; out.mkdir()
                got = run(name, data, out)
                if name == "mlkit": assert all((out / f.name).read_bytes() == f.read_bytes() for f in reference.iterdir())
                else: same(out, reference)
                shutil.rmtree(out)
                seen[name].append(got)
                print(f"repeat {r + 1}: {name}: {got['seconds']:.2f} s, {got['cpu']:.2f} s of CPU, {got['peak'] / 1e9:.2f} GB", file=sys.stderr)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, {', '.join(f'{d} {version(d)}' for d in ('pandas', 'polars', 'duckdb', 'narwhals', 'numpy', 'torch'))}; {a.rows:,} rows, {a.repeats} repeats, in turn\n")
    print("| | s, median | min | max | s of CPU | peak GB | mlkit is quicker |\n|---|---|---|---|---|---|---|")
    median = lambda name, key: statistics.median(g[key] for g in seen[name])
    for name, got in seen.items():
        s = [g["seconds"] for g in got]
        print(f"| {name} | {statistics.median(s):.2f} | {min(s):.2f} | {max(s):.2f} | {median(name, 'cpu'):.2f} | {max(g['peak'] for g in got) / 1e9:.2f} | {statistics.median(s) / median('mlkit', 'seconds'):.2f} times |")

def run(name, data, out):
    done = subprocess.run([sys.executable, __file__, "--one", name, data, out], capture_output=True, text=True)
    if done.returncode: sys.exit(f"{name} fails:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])

if __name__ == "__main__": main()
