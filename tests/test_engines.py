"A table is prepared to the same bytes by Polars, by a Dask cluster and a Spark cluster of two workers each, and by cuDF where there is a GPU."
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import numpy as np, pandas as pd, polars as pl, pyarrow.parquet as pq, pytest

from mlkit.inputs import rows as module
from mlkit.core import MlkitError, SetupError, sha256
from mlkit.jobs import choose
from mlkit.data.engines import CLUSTER, open_parts
from mlkit.data.split import Split, freeze_golden, read_golden
from mlkit.inputs.rows import fit_rows, prepare_rows
from mlkit.data.hashing import hash_column, in_unit
from mlkit.data.parts import part_files, read_parts

N, SHARES = 3000, {"train": .7, "validation": .15, "test": .15}
INPUTS = {"age": "float64", "big": "int64", "old": "bool", "city": "category", "seen": "datetime"}

@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    "Gaps in every column, whole numbers beyond float64, letters of all kinds, a class of five rows; more than ten parts, each of another length."
    r, folder = np.random.default_rng(0), tmp_path_factory.mktemp("parts")
    def gaps(values, share=0.1): return [None if r.random() < share else v for v in values]
    start = datetime(2023, 1, 1, tzinfo=timezone.utc)
    rows = pl.DataFrame({
        "age": gaps(r.normal(40, 10, N)), "big": gaps((2**60 + r.integers(0, 1000, N)).tolist()), "old": gaps((r.random(N) < .3).tolist()),
        "city": gaps(r.choice(["Köln", "Zürich", "a b", 'quo"ted', "日本", "rare"], N, p=[.4, .3, .1, .1, .099, .001]).tolist()),
        "seen": gaps([start + timedelta(hours=float(h), microseconds=1) for h in r.random(N) * 20_000]), "note": [None] * 1000 + gaps(map(str, range(N - 1000))),
        "who": gaps([f"é{k}" for k in r.integers(0, 400, N)]), "where": gaps(r.integers(0, 300, N).tolist()),
        "kind": ["lone"] * 5 + gaps(r.choice(["no", "yes"], N - 5).tolist()), "value": gaps(r.normal(0, 1, N)), "_row": range(1, N + 1)},
        schema_overrides={"big": pl.Int64, "seen": pl.Datetime("us", "UTC"), "note": pl.String, "_row": pl.Int64})
    rows = rows.with_columns(_draw=pl.Series(in_unit(hash_column(rows["_row"]))))
    edges = [0, *sorted(r.choice(np.arange(1, N), 11, replace=False).tolist()), N]
    for i, (a, b) in enumerate(zip(edges, edges[1:])): rows[a:b].write_parquet(folder / f"part-{i:06d}.parquet")
    freeze_golden(rows.filter(pl.col("who") == "é7", pl.col("value").is_not_null()), folder / "golden.json")
    return folder

def contract(target, group=None):
    task = {"kind": "classification", "value": "regression"}[target]
    return SimpleNamespace(task=task, features=[SimpleNamespace(name=k, dtype=v) for k, v in INPUTS.items()], target=SimpleNamespace(name=target, dtype={"kind": "category", "value": "float64"}[target], categories=("lone", "no", "yes")), group=group, time="seen")

CASES = {"random": ("kind", "random"), "stratified": ("kind", "stratified"), "time": ("value", "time"), "group of words, golden": ("value", "group", "who", "golden.json"), "group of numbers": ("value", "group", "where")}

def prepare(frame, parts, out, target, method, group=None, golden=None):
    split = Split(SHARES, 3, method, tuple(read_golden(parts / golden)) if golden else ())
    rows, goal, sizes = prepare_rows(frame, contract(target, group), out, split)
    assert not list(out.parent.glob(".*")), "what the engine wrote aside is gone"
    assert pq.read_metadata(out / "train.parquet").row_group(0).num_rows == module.ROW_GROUP, "as if the rows had come in one piece"
    return sizes, rows, goal, {f.name: sha256(f) for f in sorted(out.iterdir())}

@pytest.fixture(scope="module")
def expected(parts, tmp_path_factory):
    "By Polars. Small row groups, so that there are some."
    module.ROW_GROUP = 500
    yield {name: prepare(read_parts(parts), parts, tmp_path_factory.mktemp("polars") / "prepared", *case) for name, case in CASES.items()}
    module.ROW_GROUP = 1 << 16

@pytest.mark.parametrize("engine, address", [("dask", "tcp://127.0.0.1:9"), ("spark", "nonsense")])
def test_no_cluster_there(parts, monkeypatch, engine, address):
    try: choose("tables", engine)
    except SetupError as e: pytest.skip(f"not run: {e}")
    monkeypatch.setenv(CLUSTER, address); monkeypatch.setattr("mlkit.data.engines.PATIENCE", 1)
    with pytest.raises(MlkitError) as e, open_parts(parts, engine): pass
    assert address in str(e.value) and CLUSTER in str(e.value) and "\n" not in str(e.value)

def test_without_an_address_dask_is_local_and_closed(parts, monkeypatch, tmp_path):
    pytest.importorskip("distributed", reason="not run: Dask is not installed; pip install -e '.[dask]'")
    import psutil
    monkeypatch.delenv(CLUSTER, raising=False)
    with open_parts(parts, "dask") as frame:
        me = psutil.Process()
        listening = {c.laddr.ip for p in (me, *me.children(recursive=True)) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"} and len(frame) == N
        from distributed import Client, Security, get_client
        stranger = Security.temporary()
        with pytest.raises(OSError): Client(get_client().scheduler.address, timeout=2, security=stranger) # not this run's certificate
    with pytest.raises(ValueError): get_client()

@contextmanager
def cluster(engine):
    "The address of two worker processes that listen on loopback only; None: the engine needs no cluster."
    try: choose("tables", engine)
    except SetupError as e: pytest.skip(f"not run: {e}")
    if engine != "dask": yield {"spark": "local-cluster[2,1,1024]"}.get(engine)
    else:
        from distributed import LocalCluster
        with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as made: yield made.scheduler_address

@pytest.fixture(scope="module", params=["pandas", "dask", "spark", pytest.param("cudf", marks=pytest.mark.cuda)])
def frame(request, parts, expected):
    if request.param == "pandas": # no engine of mlkit's, but the way through Narwhals that cuDF takes, which needs a GPU
        yield pd.concat([pd.read_parquet(f, dtype_backend="pyarrow") for f in part_files(parts)], ignore_index=True)
        return
    with cluster(request.param) as address, pytest.MonkeyPatch.context() as env:
        env.setenv(CLUSTER, address) if address else env.delenv(CLUSTER, raising=False)
        with open_parts(parts, request.param) as frame: yield frame

@pytest.mark.parametrize("name", CASES)
def test_the_same_bytes(frame, parts, expected, tmp_path, name):
    assert prepare(frame, parts, tmp_path / "prepared", *CASES[name]) == expected[name]

def test_the_same_sample(frame, parts):
    assert fit_rows(frame, contract("kind"), n_sample=500) == fit_rows(read_parts(parts), contract("kind"), n_sample=500)
