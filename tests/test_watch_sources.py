"What production saw comes in from a real request log and from any source, whatever is wrong with it; labels come late, twice, and wrong."
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import chdir
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from conftest import one_line, wait_for
from prometheus_client import CollectorRegistry

from mlkit.cli import main
from mlkit.core import ConfigError, DataError, MlkitError, write_json
from mlkit.data.contract import Contract, Feature, save_contract
from mlkit.export.signature import Signature, Signatures, Tensor
from mlkit.monitoring.labels import CONFLICT, FOLDER, OTHERS, OUTSIDE, WHICH, join_labels, label_requests, note_labels, read_labels
from mlkit.monitoring.requests import ASIDE, NO_ANSWER, NO_ID, NO_VERSION, WatchSettings, frame_schema, read_requests, watch_settings, windows
from mlkit.registry.verdict import VERDICT
from mlkit.serving.request_log import Call, LogSettings, RequestLog

def at(text): return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)
NOW = at("2026-03-05 12:00")
def feature(name, dtype="float64", **kw): return Feature(name=name, dtype=dtype, **kw)
COLUMNS = (feature("age", range=(0, 120)), feature("salary", private=True), feature("town", "category"), feature("since", "datetime"))
CONTRACT = Contract(task="classification", target=feature("left", "category", categories=("no", "yes")), inputs=COLUMNS)
TABLE = Contract(task="classification", target=CONTRACT.target, inputs=(feature("age"), feature("calls", "int64"), feature("town", "category")))
INPUTS = tuple(Tensor(f.name, d, (1,)) for f, d in zip(COLUMNS, ("float64", "float64", "str", "datetime64[us]")))

def model(bundle="64478c78bfc8", classes=("no", "yes"), name="shop"):
    signatures = Signatures({"model": Signature(INPUTS, (Tensor("probabilities", "float32", (2,)),))}, classes)
    return SimpleNamespace(name=name, bundle=bundle, signatures=signatures, enforcer=SimpleNamespace(contract=CONTRACT))

def call(id, *ages, of=None, when=None, status=200):
    "A request as the gateway notes it."
    of, n = of or model(), len(ages)
    def every(value, dtype): return np.array([[value]] * n, dtype)
    row = [np.array(ages, float).reshape(n, 1), every(5000, float), every("Bonn", object), every("2024-05-01", "datetime64[us]")]
    said = [np.array([[0.25, 0.75]] * n, np.float32), every("yes", object)] if status == 200 else None
    came = int((when or at("2026-03-04 10:00")).timestamp() * 1e9)
    return Call(id, "web", came=came, status=status, seconds=0.002, model=of, sent=of.signatures.served.pack(row), outputs=said)

@pytest.fixture
def root(tmp_path):
    (tmp_path / "params.yaml").write_text("")
    save_contract(TABLE, tmp_path / "data/contract.json")
    return tmp_path

def write_log(root, *calls):
    "A log of the class that the gateway has."
    log = RequestLog(LogSettings(str(root / ".mlkit/serve/requests")), CollectorRegistry()).start()
    for c in calls: log.put(c)
    log.close()
    return sorted((root / ".mlkit/serve/requests").rglob("*.parquet"))

def asked(root, contract=CONTRACT, since=None, until=None, **settings):
    return read_requests(root, WatchSettings(**settings), contract, "shop", since, until, now=NOW)

def no_rest(root): return not list((root / ASIDE).glob("*"))

# The request log

def test_a_real_log(root):
    "Requests of one and of several rows, refused ones, two versions, another model: as the gateway had them, and nothing private."
    new, other = model("0123456789ab", ("yes", "no")), model(name="another")
    write_log(root, call("a", 1, 2), call("b", 400, status=400), call("c", 5, status=503), call("d", 7, of=new, when=at("2026-03-03 09:00")), call("e", 8, of=other))
    r = asked(root)
    assert (r.trouble, r.absent, r.extra, r.rows) == ({}, (), (), 5)
    assert r.frame.schema == frame_schema(CONTRACT) and "salary" not in r.frame.columns
    assert r.frame["request_id"].to_list() == ["d", "a", "a", "b", "c"] and r.frame["row"].to_list() == [0, 0, 1, 0, 0]
    assert r.frame["version"].to_list() == ["0123456789ab"] + ["64478c78bfc8"] * 4
    assert r.frame["age"].to_list() == [7, 1, 2, 400, None] and r.frame["status"].to_list() == [200, 200, 200, 400, 503]
    assert r.frame["probabilities"].to_list() == [[0.75, 0.25], [0.25, 0.75], [0.25, 0.75], None, None], "the classes of the other version are in another order"
    assert r.frame["since"][0] == at("2024-05-01") and r.frame["latency_ms"][0] == 2 and r.frame["label"].null_count() == 5

def test_a_damaged_log(root):
    "Files cut short, half-written, empty, still being written: what can be read is read, and the rest is said."
    first, = write_log(root, *(call(str(i), i) for i in range(100)))
    whole = first.read_bytes()
    for i, data in enumerate((whole[:len(whole) // 2], b"", whole[:4], b"x" * 100)):
        first.with_name(f"2026{i}.parquet").write_bytes(data)
    first.with_name(f".x.parquet.{os.getpid()}.tmp").write_bytes(whole)
    first.with_name("y.txt").write_text("no table")
    r = asked(root)
    assert r.rows == 100 and list(r.trouble.values()) == [4] and "cannot be read, left out (the first: 20260.parquet)" in next(iter(r.trouble))
    middle = bytearray(whole)
    middle[200:len(whole) // 2] = b"\xff" * (len(whole) // 2 - 200)
    first.write_bytes(middle)
    r = asked(root)
    assert next(iter(r.trouble.values())) == 5 and r.rows == 0

def test_a_log_that_grows_and_shrinks_while_it_is_read(root):
    "The gateway replaces a file by a longer one, and removes old ones: every read has whole states of files."
    first, = write_log(root, *(call(str(i), i) for i in range(50)))
    one, gone, ended = pl.read_parquet(first), first.with_name("0.parquet"), threading.Event()
    def turn():
        i = 0
        while not ended.is_set():
            i += 1
            frame = pl.concat([one, *(one.with_columns(request_id=pl.lit(f"{k}-") + pl.col("request_id")) for k in range(i % 7))])
            frame.write_parquet(aside := first.with_name(".aside.tmp"))
            os.replace(aside, first)
            gone.write_bytes(b"x") if i % 2 else gone.unlink(missing_ok=True)
    (t := threading.Thread(target=turn)).start()
    try:
        for _ in range(40):
            r = asked(root)
            assert r.rows % 50 == 0 and r.rows >= 50 and r.frame.drop_nulls("age").height == r.rows
            assert all("0.parquet" in text for text in r.trouble), r.trouble
    finally:
        ended.set()
        t.join()

def test_the_same_rows_twice(root):
    "A copied file, an id that came again with an answer, an id that came again without one."
    first, = write_log(root, call("a", 1, 2), call("b", 3, status=503))
    first.with_name("copy.parquet").write_bytes(first.read_bytes())
    write_log(root, call("b", 3, when=at("2026-03-04 11:00")), call("a", 1, status=503, when=at("2026-03-04 09:00")))
    r = asked(root)
    assert r.trouble == {"rows that repeat another (the same request_id and row), taken once": 5}
    assert sorted(r.frame.select("request_id", "row", "status").rows()) == [("a", 0, 200), ("a", 1, 200), ("b", 0, 200)]

def test_what_is_not_asked_for_is_not_read(root):
    "Times bound what is read; old files are not opened."
    old, = write_log(root, *(call(str(i), i, when=at("2026-02-01") + timedelta(hours=i)) for i in range(48)))
    assert asked(root, since=at("2026-02-01 10:00"), until=at("2026-02-01 20:00")).frame["age"].to_list() == list(range(10, 20))
    assert asked(root, since=datetime(2026, 2, 2, 20)).rows == 4, "a time without a zone is UTC"
    os.utime(old, (at("2026-02-03").timestamp(),) * 2)
    old.write_bytes(b"no table")
    os.utime(old, (at("2026-02-03").timestamp(),) * 2)
    assert asked(root, since=at("2026-02-10")).trouble == {}

def test_nothing_yet(root):
    "No folder, an empty one, a table without rows, an empty folder as source: an empty frame."
    (root / "empty").mkdir()
    (root / "head.csv").write_text("time,age\n")
    (root / "lines.jsonl").write_text("")
    pl.DataFrame(schema={"time": pl.Datetime, "age": pl.Int64}).write_parquet(root / "none.parquet")
    for source in (None, "empty", "head.csv", "lines.jsonl", "none.parquet"):
        r = asked(root, TABLE, source=source)
        assert r.rows == 0 and r.trouble == {} and r.frame.schema == frame_schema(TABLE) and list(windows(r, "1d")) == [] == list(windows(r, 10)), source

# Any source

def table(n=3, **more):
    times = pl.Series([at("2026-03-01 10:00") + timedelta(hours=i) for i in range(n)], dtype=pl.Datetime("us", "UTC"))
    return pl.DataFrame({"time": times, "request_id": [f"r{i}" for i in range(n)], "age": [30.0 + i for i in range(n)],
                         "calls": list(range(n)), "town": ["Bonn"] * n, "answer": ["yes"] * n}).with_columns(**more)

def test_one_table_in_many_forms(root):
    "CSV, Parquet, JSON lines, SQLite, an address, a folder: the same frame."
    t = table()
    t.write_csv(root / "a.csv")
    t.write_parquet(root / "b.parquet")
    t.with_columns(pl.col("time").dt.to_string("iso:strict")).write_ndjson(root / "c.jsonl")
    (root / "d").mkdir()
    t[:2].write_parquet(root / "d/1.parquet")
    t[2:].write_parquet(root / "d/2.parquet")
    with sqlite3.connect(root / "e.db") as db:
        db.execute("CREATE TABLE asked (time TEXT, request_id TEXT, age REAL, calls INTEGER, town TEXT, answer TEXT)")
        db.executemany("INSERT INTO asked VALUES (?, ?, ?, ?, ?, ?)", t.with_columns(pl.col("time").dt.to_string("iso:strict")).rows())
    db.close()
    frames = {s: asked(root, TABLE, source=s) for s in ("b.parquet", "a.csv", "c.jsonl", "d", "e.db", f"file://{root}/a.csv")}
    first = frames["b.parquet"].frame
    assert first["calls"].to_list() == [0, 1, 2] and first["time"].to_list() == t["time"].to_list()
    for source, r in frames.items():
        assert r.frame.equals(first), source
        assert r.trouble == {NO_VERSION: 3} and r.absent == (), source

def test_parquet_of_two_schemas(root):
    "A column more, a column less, another type, another zone, a struct, a file that is cut: each file on its own."
    (root / "d").mkdir()
    t = table()
    t.write_parquet(root / "d/1.parquet")
    t.select(pl.col("time").dt.convert_time_zone("Asia/Tokyo").dt.cast_time_unit("ns"), pl.lit("x").alias("request_id"), pl.col("age").cast(pl.Int32), colour=pl.lit("red"),
             answer=pl.lit("no").cast(pl.Categorical))[:1].write_parquet(root / "d/2.parquet")
    t.select("time", request_id=pl.lit("y") + pl.col("request_id"), input=pl.struct("calls", age=pl.lit("forty")), answer="answer").write_parquet(root / "d/3.parquet")
    (root / "d/4.parquet").write_bytes((root / "d/1.parquet").read_bytes()[:-9])
    r = asked(root, TABLE, source="d")
    assert r.rows == 7 and r.frame["calls"].null_count() == 1 and r.frame["age"].null_count() == 3 and r.extra == ("colour",) and r.absent == ()
    assert r.trouble == {NO_VERSION: 7, "column 'age': not a number, taken as missing": 3, "column 'calls': not in every file, taken as missing": 1,
                         "column 'town': not in every file, taken as missing": 4, "files that cannot be read, left out (the first: 4.parquet)": 1}
    assert r.frame.filter(pl.col("request_id") == "x")["time"].to_list() == [at("2026-03-01 10:00")]
    for f in (root / "d").iterdir(): f.write_bytes(b"x" * 50)
    with pytest.raises(DataError, match="1.parquet: cannot be read"): asked(root, TABLE, source="d")

def test_every_bad_value(root):
    "Rows stay and values go; a row goes only where nobody can tell when it was, or that it was."
    t = table(6, age=pl.Series([1.0, float("nan"), float("inf"), None, 1e300, -5.0]), calls=pl.Series(["1", "2", None, "x", "5", "6"]),
              time=pl.Series(["2026-03-01T10:00:00+01:00", "2026-03-01 10:00:00", "2026-03-05T12:04:00Z", "2026-03-05T12:06:00Z", "soon", None]),
              answer=pl.Series(["yes", "no", "perhaps", None, "yes", "no"]), request_id=pl.Series(["a", None, "a", "d", "e", "f"]), extra=pl.lit(1))
    t.drop("town").write_parquet(root / "x.parquet")
    r = asked(root, TABLE, source="x.parquet")
    assert r.frame["time"].to_list() == [at("2026-03-01 09:00"), at("2026-03-01 10:00")] and r.frame["request_id"].to_list() == ["a", "2"]
    assert r.frame["age"].to_list() == [1, None] and r.frame["calls"].to_list() == [None, None] and r.absent == ("town",) and r.extra == ("extra",)
    assert r.trouble == {
        "rows without a readable time, left out": 2, "rows more than 5 minutes in the future (check the clocks), left out": 1,
        "times without a zone, taken as UTC": 1, "column 'age': not a number, taken as missing": 1, "column 'calls': not a whole number, taken as missing": 2,
        "rows without a request_id, which are numbered": 1, NO_VERSION: 3,
        "rows that repeat another (the same request_id and row), taken once": 1}

def test_other_names(root):
    "`watch.columns` names theirs; what is wrong there is one line that names the key."
    t = table().rename({"time": "created_at", "answer": "prediction", "request_id": "id"})
    t.write_csv(root / "x.csv")
    good = {"time": "created_at", "answer": "prediction", "request_id": "id"}
    r = asked(root, TABLE, source="x.csv", columns=good)
    assert r.rows == 3 and r.frame["answer"].to_list() == ["yes"] * 3 and r.extra == () and r.trouble == {NO_VERSION: 3}
    for columns, error, words in (({}, DataError, "x.csv: no column 'time'.*columns: {time: created_at}.*it has created_at"),
                                  (good | {"anser": "x"}, ConfigError, "watch.columns: no column 'anser'; did you mean 'answer'?"),
                                  (good | {"town": "twon"}, DataError, "x.csv: no column 'twon', which watch.columns.town .*did you mean 'town'?")):
        with pytest.raises(error, match=words): asked(root, TABLE, source="x.csv", columns=columns)
    t.select("created_at", "age").write_csv(root / "y.csv")
    r = asked(root, TABLE, source="y.csv", columns={"time": "created_at"})
    assert set(r.trouble) == {NO_ID, NO_VERSION, NO_ANSWER} and r.frame["request_id"].to_list() == ["1", "2", "3"] and r.absent == ("calls", "town")
    assert asked(root, TABLE, since=at("2026-03-01 11:00"), source="y.csv", columns={"time": "created_at"}).frame["request_id"].to_list() == ["2", "3"], "a number does not depend on what is asked for"

def test_the_released_version(root):
    "Rows without a version are of the released one."
    write_json(root / VERDICT, {"bundle": "ab" * 32})
    table(version=pl.Series([None, "cd" * 32, "v7"])).write_parquet(root / "x.parquet")
    assert asked(root, TABLE, source="x.parquet").frame["version"].to_list() == ["ab" * 6, "cd" * 6, "v7"]

def test_a_source_that_does_not_answer(root):
    "One line, and what was there stays."
    noted = note_labels(root, pl.DataFrame({"request_id": ["a"], "label": ["yes"]}))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        closed = s.getsockname()[1]
    for source, words in ((f"postgresql://127.0.0.1:{closed}/shop?table=asked", "postgres"), (f"http://127.0.0.1:{closed}/x.csv", "nothing there; check the name, and the network"),
                          ("nowhere.csv", "nowhere.csv"), ("no*.parquet", "no file matches|neither a file"), ("x.xlsx", "x.xlsx"), ("lite.db", "no SQLite")):
        (root / "x.xlsx").write_bytes(b"PK\x03\x04")
        (root / "lite.db").write_bytes(b"no database")
        with pytest.raises(MlkitError, match=words) as e: asked(root, TABLE, source=source)
        assert "\n" not in str(e.value) and "ingest.source" not in str(e.value), e.value
        del e
    assert noted.path.is_file() and no_rest(root)

def test_the_section(root):
    "Strict both ways, and the key is named."
    assert watch_settings(root) == WatchSettings()
    for text, words in (("watch: {windows: 1d}", "'watch' has no parameter 'windows'; did you mean 'window'"), ("watch: {window: 2h}", "watch.window: should be"),
                        ("watch: {columns: [time]}", "watch.columns"), ("watch: {source: 3}", "watch.source"), ("watch: 1d", "section 'watch'")):
        (root / "params.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words): watch_settings(root)

# Windows

def test_windows_hold_every_row_once(root):
    "Whatever the order of the source and the size of the parts: by hour, by day, by number."
    rng, n = np.random.default_rng(0), 120_000
    seconds = rng.integers(0, 86_400 * 3, n)
    pl.DataFrame({"time": pl.Series(seconds * 1_000_000 + 1_772_323_200_000_000).cast(pl.Datetime("us", "UTC")), "request_id": np.arange(n).astype(str), "age": seconds * 1.0}).write_parquet(root / "x.parquet")
    r = asked(root, TABLE, source="x.parquet")
    assert len(r.parts) == 3
    for window, wanted in (("1h", 72), ("1d", 3), (50_000, 3), (7, None)):
        if window == 7: r = asked(root, TABLE, since=at("2026-03-01"), until=at("2026-03-01 00:10"), source="x.parquet")
        cut = list(windows(r, window, ["request_id", "time", "age"], now=NOW))
        ids = pl.concat(w.frame["request_id"] for w in cut)
        assert len(ids) == ids.n_unique() == r.rows and wanted in (None, len(cut))
        for w in cut:
            assert w.frame["time"].is_sorted() and w.start <= w.frame["time"].min() and w.frame["time"].max() < w.end
            assert w.frame["age"].to_list() == [(t - at("2026-03-01")).total_seconds() for t in w.frame["time"]]
        if isinstance(window, int): assert all(len(w.frame) >= window for w in cut[:-1]) and not any(w.open for w in cut[:-1])
        assert [w.start for w in cut] == sorted(w.start for w in cut) and all(a.end <= b.start for a, b in zip(cut, cut[1:]))

SIZE = """
import re, sys
from datetime import datetime, timezone
from pathlib import Path
from mlkit.data.contract import Contract, Feature
from mlkit.monitoring.requests import WatchSettings, read_requests, windows
root, n = Path(sys.argv[1]), 0
inputs = tuple(Feature(name=f"x{i}", dtype="float64") for i in range(10))
contract = Contract(task="classification", inputs=inputs, target=Feature(name="y", dtype="category", categories=("no", "yes")))
r = read_requests(root, WatchSettings(), contract, "shop", now=datetime(2026, 3, 5, tzinfo=timezone.utc))
for w in windows(r, "1h"): n += len(w.frame)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(r.rows, n, len(r.trouble), int(peak) // 1024)
"""

def test_a_million_rows_in_400_mb(root):
    "A log of a million rows of ten inputs, read and cut into hours by a process of its own."
    folder = root / ".mlkit/serve/requests/shop/64478c78bfc8"
    folder.mkdir(parents=True)
    rng, n = np.random.default_rng(0), 50_000
    for i in range(20):
        times = pl.Series(1_772_323_200_000_000 + np.arange(i * n, (i + 1) * n) * 300_000).cast(pl.Datetime("us", "UTC"))
        pl.DataFrame({"time": times, "request_id": pl.Series(np.arange(i * n, (i + 1) * n)).cast(pl.String).str.zfill(25)}).with_columns(
            row=pl.lit(0, pl.UInt32), model=pl.lit("shop"), version=pl.lit("64478c78bfc8"), status=pl.lit(200, pl.Int16), answer=pl.lit("yes"),
            input=pl.struct(**{f"x{k}": pl.Series(rng.random(n)) for k in range(10)}),
            probabilities=pl.Series(rng.random((n, 2)).astype(np.float32))).write_parquet(folder / f"{i:02}.parquet", compression="lz4")
    done = subprocess.run([sys.executable, "-c", SIZE, root], capture_output=True, text=True, timeout=300, env=os.environ | {"POLARS_MAX_THREADS": "2"})
    rows, cut, trouble, peak = map(int, done.stdout.split() or pytest.fail(done.stderr))
    assert (rows, cut, trouble) == (1_000_000, 1_000_000, 0) and peak < 400, f"{peak} MB"
    assert no_rest(root)

# Labels

def test_labels_come_late_and_again(root):
    "A file that grows is given after each day; the windows have what is known."
    write_log(root, *(call(f"{day}-{i}", i, when=at(f"2026-03-0{day} 10:00")) for day in (1, 2, 3) for i in range(10)), call("many", 1, 2))
    truth, n = root / "truth.csv", []
    for day in (1, 2, 3):
        truth.write_text("request_id,label\n" + "".join(f"{d}-{i},{'yes' if i % 2 else 'no'}\n" for d in range(1, day + 1) for i in range(10)))
        with chdir(root):
            for new in (f"10 new labels{', %d were known' % (10 * day - 10) if day > 1 else ''}: ", f"0 new labels, {10 * day} were known"):
                said = CliRunner().invoke(main, ["label", "truth.csv"])
                assert said.exit_code == 0 and said.output.startswith(new), said.output
        labels, trouble = read_labels(root, WatchSettings(), CONTRACT)
        r = label_requests(asked(root), labels, CONTRACT)
        n.append([w.frame["label"].count() for w in windows(r, "1d")])
        assert trouble == {} == r.trouble
    assert n == [[10, 0, 0, 0], [10, 10, 0, 0], [10, 10, 10, 0]] and len(list((root / FOLDER).iterdir())) == 3

def test_labels_that_are_wrong(root):
    "Of nobody, of nobody in particular, none of the classes, of two minds: counted, and not taken."
    write_log(root, call("a", 1), call("b", 1), call("c", 1), call("d", 1), call("many", 1, 2))
    given = [("a", None, "yes"), ("a", 0, "yes"), ("b", 0, "yes"), ("b", 0, "no"), ("c", None, "perhaps"), ("many", None, "no"), ("many", 1, "no"), ("x", 0, "no"), ("d", 1, "no"), (None, 0, "no")]
    labels = pl.DataFrame(given, schema=["request_id", "row", "label"], orient="row")
    wanted = {"labels without a request_id, left out": 1, OUTSIDE[True]: 1, OTHERS: 2, WHICH: 1, CONFLICT: 1}
    frame, trouble = join_labels(asked(root).frame, labels, CONTRACT)
    assert trouble == wanted
    assert frame.filter(pl.col("label").is_not_null()).select("request_id", "row", "label").rows() == [("a", 0, "yes"), ("many", 1, "no")]
    r = label_requests(asked(root), labels, CONTRACT)
    assert r.trouble == wanted and r.frame.equals(frame)

def test_the_command_refuses_in_one_line(root):
    "No id, no label, nothing good, no such file."
    for text, words in (("id,label\na,yes\n", ["no column 'request_id'", "it has id, label"]), ("request_id,age\na,7\n", ["no column 'label'"]),
                        ("request_id,label\na,perhaps\n", ["no label can be taken", "1 labels that are none"]), (None, ["x.csv"])):
        (root / "x.csv").write_text(text) if text else (root / "x.csv").unlink()
        with chdir(root): done = CliRunner().invoke(main, ["label", "x.csv"])
        one_line(SimpleNamespace(returncode=done.exit_code, stdout=done.stdout, stderr=done.stderr), *words)
        assert not list(root.glob(f"{FOLDER}/*"))

KILLED = """
import os, sys, time
from pathlib import Path
import polars as pl
from mlkit.monitoring.labels import note_labels
def hang(_): (Path(sys.argv[1]) / "hangs").touch(); time.sleep(600)
os.fsync = hang
note_labels(Path(sys.argv[1]), pl.DataFrame({"request_id": ["a"], "label": ["yes"]}))
"""

def test_killed_while_it_writes(root):
    "Nothing half-written is read; the next one cleans up, and the labels are there."
    p = subprocess.Popen([sys.executable, "-c", KILLED, root])
    try: wait_for(lambda: (root / "hangs").exists(), "the write")
    finally:
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert len(list((root / FOLDER).glob(".*.tmp"))) == 1 and read_labels(root, WatchSettings(), TABLE)[0].is_empty()
    noted = note_labels(root, pl.DataFrame({"request_id": ["a"], "label": ["yes"]}))
    assert noted.new == 1 and list((root / FOLDER).iterdir()) == [noted.path] and len(read_labels(root, WatchSettings(), TABLE)[0]) == 1
