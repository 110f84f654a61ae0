"`mlkit monitor` as a command: killed at any moment, given damaged files, logs of others, nothing at all."
import json
import shutil
from contextlib import chdir
from datetime import datetime, timedelta, timezone

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from conftest import Moments
from mlkit.cli import main
from mlkit.core import NO, write_json
from mlkit.data.contract import Contract, Feature, save_contract
from mlkit.inputs.columns import Category, Number
from mlkit.inputs.rows import Rows
from mlkit.monitoring.profile import PROFILE, answers_frame, fit_profile
from mlkit.monitoring.watch import look
from mlkit.registry.bundle import write_bundle
from mlkit.registry.verdict import VERDICT
from mlkit.targets.classes import Classes
from mlkit.task import Task, save_task

TASK = Task(Rows((Number("age", "float64", fill=40.0), Category("town", "category", values=("Bonn", "Ulm")))), Classes("left", ("no", "yes")))
CONTRACT = Contract(task="classification", target=Feature(name="left", dtype="category", categories=("no", "yes")),
                    inputs=(Feature(name="age", dtype="float64", nullable=True), Feature(name="town", dtype="category", nullable=True)))
DAY = datetime(2026, 11, 2, tzinfo=timezone.utc)

def model(frame):
    yes = 1 / (1 + np.exp(-(frame["age"].to_numpy() - 40) / 6))
    return np.column_stack([1 - yes, yes])

def customers(n, seed):
    r = np.random.default_rng(seed)
    return pl.DataFrame({"age": r.normal(40, 12, n), "town": r.choice(["Bonn", "Ulm"], n)})

def log(root, day, frame, model_name="left", version=None, **more):
    n, version = len(frame), version or json.loads((root / VERDICT).read_text())["bundle"][:12]
    folder = root / ".mlkit/serve/requests" / model_name / version
    folder.mkdir(parents=True, exist_ok=True)
    start = (DAY + timedelta(days=day)).timestamp()
    times = pl.Series("time", [int((start + 80 * i) * 1e6) for i in range(n)]).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    rows = pl.DataFrame({"time": times, "request_id": [f"{day}-{i}" for i in range(n)]}).with_columns(
        row=pl.lit(0, pl.UInt32), model=pl.lit(model_name), version=pl.lit(version), status=pl.lit(200, pl.Int16), latency_ms=pl.lit(2.0, pl.Float32))
    rows = rows.with_columns(**{name: pl.lit(value) for name, value in more.items()})
    rows.with_columns(frame.to_struct("input")).hstack(answers_frame(TASK, model(frame))).write_parquet(folder / f"2026110{day + 2}T000000-1-1.parquet")

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("watch") / "shop"
    parts = root / "parts"
    parts.mkdir(parents=True)
    held = customers(2000, 1)
    y = (np.random.default_rng(0).random(2000) < model(held)[:, 1]).astype(int)
    save_contract(CONTRACT, parts / "contract.json")
    save_task(TASK, parts)
    write_json(parts / PROFILE, fit_profile(TASK, customers(4000, 0), held, model(held), y).to_dict())
    bundle = write_bundle(root / "models/bundle", {f: parts / f for f in ("contract.json", "task.json", PROFILE)}, {})
    write_json(root / VERDICT, {"released": True, "bundle": bundle, "model": "left"})
    (root / "params.yaml").write_text("ingest: {}\n")
    for day in range(5):
        log(root, day, customers(300, 10 + day).with_columns(pl.col("age") + (15 if day > 3 else 0)))
    return root

@pytest.fixture
def root(made, tmp_path): return shutil.copytree(made, tmp_path / "shop")

def monitor(root, *args):
    with chdir(root): done = CliRunner().invoke(main, ["monitor", *args])
    assert isinstance(done.exception, (SystemExit, type(None))) and len(done.stderr.splitlines()) <= 1, done.output
    return done.exit_code, done.output

def windows(root): return json.loads((root / "reports/watch.json").read_text())["windows"]

def findings(root):
    "What a look says, and what it leaves: the windows that are kept."
    said = look(root).to_dict() | {"made": None}
    return said, {p.name: p.read_bytes() for p in (root / ".mlkit/watch/250").iterdir() if p.suffix == ".json"}

def test_killed_at_any_moment_it_says_the_same(root, tmp_path, monkeypatch):
    "The log was trimmed, so windows by number begin elsewhere: new ones are written, old ones removed. Nothing is lost, nothing counted twice."
    monkeypatch.setattr("mlkit.monitoring.page.watch_page", lambda look: "<html>") # what it draws is no state
    (root / "params.yaml").write_text("ingest: {}\nwatch: {window: 250}\n")
    monitor(root)
    min(root.glob(".mlkit/serve/requests/left/*/*.parquet")).unlink()
    (tmp_path / "killed").mkdir()
    with Moments(root, tmp_path / "killed") as moments: monitor(root)
    whole = findings(root)
    assert sum(w["rows"] for w in whole[0]["windows"]) == 250 + 4 * 300 and len(moments.seen) >= 20, moments.seen
    for left, what in moments.seen.items():
        json.loads((left / "reports/watch.json").read_text()) # whole
        assert findings(left) == whole, what

def test_what_it_says(root):
    code, said = monitor(root)
    last = windows(root)[-1]
    assert [w["status"] for w in windows(root)[:4]] == ["calm"] * 4 and {f["column"] for f in last["findings"]} >= {"age"}
    assert code == NO * (last["status"] == "alert") and "age: the median is" in said and (root / "reports/watch.html").is_file()
    code, said = monitor(root, "--since", "2026-11-05", "--until", "2026-11-06")
    assert code == 0 and "Calm" in said and len(windows(root)) == 1

def test_files_that_are_damaged_or_of_others(root):
    monitor(root)
    (root / ".mlkit/watch/1d/20261103T000000000000.json").write_text("{")
    file = next((root / ".mlkit/serve/requests/left").glob("*/20261104*.parquet"))
    file.write_bytes(file.read_bytes()[:-200])
    log(root, 0, customers(300, 77), model_name="prices")
    log(root, 6, customers(300, 78), version="0123456789ab")
    _, said = monitor(root)
    assert "files that cannot be read" in said and "windows of .mlkit/watch that cannot be read" in said, said
    assert sum(w["rows"] for w in windows(root)) >= 4 * 300 and all(w["version"] != "0123456789ab" for w in windows(root))

def test_who_was_held_out_is_not_judged(root):
    "An older model answered them: its answers and errors are not those of the released one."
    log(root, 1, customers(200, 79), version="0123456789ab", held_out=True, request_id=pl.Series([f"held-{i}" for i in range(200)]))
    assert [w["rows"] for w in look(root).to_dict()["windows"]] == [300] * 5

def wrong(root, what):
    if what == "no log": shutil.rmtree(root / ".mlkit")
    if what == "no release": (root / VERDICT).unlink()
    if what == "no profile": (root / "models/bundle" / PROFILE).unlink()
    if what == "a spoilt profile": (root / "models/bundle" / PROFILE).write_text("[]")
    if what == "a source that is not there": (root / "params.yaml").write_text("ingest: {}\nwatch: {source: nowhere.parquet}\n")
    if what == "an unknown key": (root / "params.yaml").write_text("ingest: {}\nwatch: {windows: 1d}\n")

@pytest.mark.parametrize("what, code, words", [
    ("no log", 3, "Nobody can tell yet: 0 rows"), ("no release", 1, "run 'mlkit repro' first"), ("no profile", 1, "profile.json"),
    ("a spoilt profile", 1, "profile.json"), ("a source that is not there", 1, "nowhere.parquet"), ("an unknown key", 1, "did you mean 'window'"),
    ("a date that is none", 1, "yesterday: is no moment")])
def test_wrong_input_is_one_line(root, what, code, words):
    wrong(root, what)
    got, said = monitor(root, *["--since", "yesterday"][:2 * (what == "a date that is none")])
    assert (got, words in said) == (code, True), said
