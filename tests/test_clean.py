"Twenty clean sets: the audit finds nothing above a note in them, in the split that `prepare` makes."
import numpy as np, polars as pl
import pytest
from sklearn import datasets

from mlkit.audit.data import audit_data
from mlkit.audit.run import audit
from mlkit.data.parts import ingest_table
from mlkit.data.scan import Frame
from mlkit.data.split import Split

SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}

def bundled(name, **columns):
    "A table of scikit-learn."
    data = getattr(datasets, f"load_{name}")(as_frame=True)
    return pl.from_pandas(data.data).with_columns(y=named(data.target.to_numpy(), data.get("target_names"))).with_columns(**columns)

def named(y, names=None): # classes as words, numbers as they are
    if len(np.unique(y)) > 20:
        return pl.Series(y)
    return pl.Series([f"class {names[v] if names is not None else v}" for v in y])

def classes(seed=0, n=600, **kw):
    X, y = datasets.make_classification(n, 8, n_informative=4, random_state=seed, **kw)
    return table(X, named(y))

def numbers(seed=0, n=600, noise=20.0, **kw):
    X, y = datasets.make_regression(n, 8, n_informative=5, noise=noise, random_state=seed, **kw)
    return table(X, pl.Series(y))

def table(X, y): return pl.DataFrame({f"x{i}": v for i, v in enumerate(X.T)}).with_columns(y=y)

def with_ids(frame):
    random = np.random.default_rng(0)
    names = [f"{a} {b}" for a, b in zip(random.choice(["Ann", "Bo", "Cy", "Di"], len(frame)), random.permutation(len(frame)))]
    return frame.with_columns(customer=pl.Series([f"C{i:06d}" for i in range(len(frame))]), name=pl.Series(names))

def with_gaps(frame, share=0.1):
    random = np.random.default_rng(0)
    gaps = [pl.when(pl.Series(random.random(len(frame)) < share)).then(None).otherwise(pl.col(c)).alias(c) for c in frame.columns if c != "y"]
    return frame.with_columns(gaps)

def mixed():
    "Numbers, categories, yes and no, a date; few of them matter."
    random, n = np.random.default_rng(1), 800
    age, town = random.integers(18, 90, n), random.integers(0, 30, n)
    plan, active = random.choice(["basic", "plus", "pro"], n), random.random(n) < 0.6
    score = 0.03 * (age - 50) + (plan == "pro") - active + random.normal(size=n)
    return pl.DataFrame({"age": age, "town": [f"town {t}" for t in town], "plan": plan, "active": active,
                         "income": random.lognormal(10, 0.8, n), "y": np.where(score > 0, "left", "stays")})

def coarse():
    "Few columns of few values: most rows are equal to another person's."
    random, n = np.random.default_rng(2), 700
    age, sex = random.integers(2, 9, n) * 10, random.choice(["f", "m"], n)
    smokes, ill = random.random(n) < 0.3, random.random(n)
    return pl.DataFrame({"person": [f"P{i}" for i in range(n)], "age": age, "sex": sex, "smokes": smokes,
                         "y": np.where(ill < 0.15 + 0.004 * age + 0.2 * smokes, "ill", "well")})

def cities():
    "Prices that hang on the town, of which every row tells the name."
    random, n = np.random.default_rng(3), 900
    town, area = random.integers(0, 40, n), random.lognormal(4.3, 0.4, n)
    level = random.normal(1, 0.15, 40)[town]
    return pl.DataFrame({"town": [f"town {t}" for t in town], "area": area, "rooms": (area / 25).round() + random.integers(0, 2, n),
                         "y": 1000 * level * area + random.normal(0, 9000, n)})

def counted():
    "A count of events: many zeros, a long tail."
    random, n = np.random.default_rng(4), 700
    X = random.normal(size=(n, 4))
    return table(np.column_stack([X, random.poisson(1.5, n), random.exponential(3, n)]), pl.Series(random.poisson(np.exp(1.5 + 0.5 * X[:, 0]))))

CLEAN = {
    "iris": lambda: bundled("iris"),
    "wine": lambda: bundled("wine"),
    "breast_cancer": lambda: bundled("breast_cancer"),
    "diabetes": lambda: bundled("diabetes"),
    "digits": lambda: bundled("digits")[:900],
    "two classes": lambda: classes(0),
    "two classes that overlap": lambda: classes(1, class_sep=0.4),
    "flipped by nature": lambda: classes(2, flip_y=0.1),
    "five classes": lambda: classes(3, n_classes=5, n_clusters_per_class=1),
    "imbalanced": lambda: classes(4, n=1500, weights=[0.95]),
    "apart": lambda: classes(5, class_sep=3.0),
    "with ids": lambda: with_ids(classes(6)),
    "with gaps": lambda: with_gaps(classes(7)),
    "small": lambda: classes(8, n=60),
    "numbers": lambda: numbers(0),
    "numbers that are hard": lambda: numbers(1, noise=300.0),
    "numbers that are easy": lambda: numbers(2, noise=1.0),
    "numbers with ids and gaps": lambda: with_ids(with_gaps(numbers(3))),
    "few numbers": lambda: numbers(4, n=50),
    "mixed": mixed,
    "coarse": coarse,
    "cities": cities,
    "counted": counted,
    "noise": lambda: classes(9).with_columns(y=named(np.random.default_rng(0).integers(0, 2, 600))),
}

@pytest.mark.parametrize("name", CLEAN)
def test_clean_sets(tmp_path, name):
    contract, _ = ingest_table(Frame(CLEAN[name]()), tmp_path, "y", None, 100_000, progress=lambda line: None)
    found = audit(audit_data(contract, tmp_path, Split(SHARES), 2000))
    assert [(f.check, f.severity, f.text) for f in found if f.severity != "info"] == []
    assert [f.check for f in found if not f.cannot_know] == []
