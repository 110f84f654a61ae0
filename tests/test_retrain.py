"A retraining: poisoned batches stay out, a new truth comes in, losers are not handed over, and no kill makes it forget."
import shutil
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import cv2
import numpy as np
import polars as pl
import pytest
from conftest import FULL, Moments, one_line
from mlkit.commands.retrain import start_rollout
from mlkit.core import DataError, read_json, write_json
from mlkit.data.contract import load_contract
from mlkit.data.parts import ingest_table, read_parts
from mlkit.data.shards import read_index, write_shards
from mlkit.data.split import Split, read_golden
from mlkit.flow.config import read_params
from mlkit.registry.history import read_history
from mlkit.registry.promotion import promote
from mlkit.registry.store import FETCHED
from mlkit.registry.verdict import VERDICT
from mlkit.retraining import steps
from mlkit.retraining.batch import QUARANTINE
from mlkit.retraining.compare import recent_rows
from mlkit.retraining.state import FOLDER, STATE, State, read_state, write_state
from mlkit.retraining.steps import Edges, retrain
from mlkit.retraining.trigger import WATCH
from mlkit.rollout.file import ROLLOUT, read_state as read_rollout
from mlkit.rollout.state import RolloutError
from mlkit.sources.grown import is_golden
from mlkit.sources.registry import open_source
from sklearn.datasets import load_digits
from test_new import Made, releases_of_a_shop


def labelled(n=600, seed=1, turned=False, flip=0.0):
    "Customers as production sees them, with what became of them."
    rng = np.random.default_rng(seed)
    age, calls = rng.uniform(18, 80, n), rng.poisson(3, n)
    left = rng.random(n) < 1 / (1 + np.exp(-(0.08 * (-1 if turned else 1) * (age - 50) + 0.7 * (calls - 3))))
    left ^= rng.random(n) < flip
    time = [datetime(2026, 11, 20, tzinfo=timezone.utc) + timedelta(minutes=10 * i) for i in range(n)]
    return pl.DataFrame({"age": age, "calls": calls, "town": rng.choice(["Rome", "Oslo", "Bonn"], n), "left": np.where(left, "yes", "no"),
                         "time": time, "request_id": [f"r{seed}-{i}" for i in range(n)]})


@pytest.fixture(scope="module")
def made(shared):
    "Version 1 has learned nothing, version 2 has, and is the champion."
    project = shared("shop", releases_of_a_shop, Made)
    project.param(retrain__least=100)
    return project


@pytest.fixture
def shop(made, tmp_path, monkeypatch):
    project = made.clone(tmp_path / "shop")
    shutil.copyfile(made.root.parent / "customers.csv", tmp_path / "customers.csv")
    monkeypatch.chdir(project.root)
    return project


def crowned(project, version): promote(project.root, "shop", version, "champion", "for the test")


def last_run_was(project, version):
    "The project as a run would have left it that made this version."
    crowned(project, version)
    at = project.root / FETCHED / "shop" / version
    shutil.rmtree(project / "models/bundle")
    shutil.copytree(at / "bundle", project / "models/bundle")
    verdict, = at.glob("*/verdict.json")
    shutil.copyfile(verdict, project / VERDICT)


def edges(project): return Edges(lambda root: 0, start_rollout(project.root, "shop"))


def run(project, frame=None, when="now", **more):
    lines = []
    if frame is not None:
        frame.write_parquet(project / "new.parquet")
        more["data"] = "new.parquet"
    return retrain(project.root, when, edges(project), say=lines.append, **more), lines


def events(project): return [e for e in read_history(project.root) if e["what"] == "retrain"]


def test_the_winner_is_handed_over(shop):
    "And the data have grown, with the golden set as it was; one retraining a cooldown; what was trained on is known."
    crowned(shop, "1")
    code, lines = run(shop, labelled())
    assert code == 0 and [line.split(":")[0] for line in lines] == ["Trigger", "Collected", "Audited", "Trained", "Compared", "Handed over"], lines
    rollout = read_rollout(shop.root)
    assert (rollout.plan.stable.version, rollout.plan.candidate.version) == ("1", "2")
    end, = events(shop)
    assert end["phase"] == "handed over" and end["evidence"]["compared"]["recent"]["outcome"] == "better" and end["evidence"]["compared"]["golden"]["samples"] > 100
    with pytest.raises(RolloutError, match="a rollout of version 2 is checking"): run(shop, labelled(seed=2))
    (shop / ROLLOUT).unlink()
    code, lines = run(shop, labelled(seed=2), when="schedule")
    assert code == 0 and "less than 7d ago" in lines[-1] and len(events(shop)) == 1
    params = read_params(shop.root)
    assert params["ingest"]["source"] == "grown://labelled" and params["prepare"]["golden"] == "golden.json"
    contract = load_contract(shop / "data/contract.json")
    before = read_parts(shop / "data/shards").collect()
    ingest_table(open_source("grown://labelled", shop.root), shop / "again", "left", contract)
    after = read_parts(shop / "again").collect()
    added = end["evidence"]["audited"]["added"]
    assert after.head(len(before)).equals(before) and len(after) == len(before) + added
    split = Split.from_params({"shares": {"train": 0.7, "validation": 0.15, "test": 0.15}, "seed": 0, "method": "random", "golden": "golden.json"}, shop.root)
    frame, _ = split.apply(read_parts(shop / "again"), contract)
    frame, golden = frame.collect(), read_golden(shop / "golden.json")
    held = is_golden(frame, contract, golden)
    assert held.sum() == len(pl.read_parquet(shop / "data/prepared/test.parquet")) and set(frame.filter(pl.Series(held))["_split"]) == {"test"}


def test_a_loser_is_not_handed_over(shop):
    last_run_was(shop, "1")
    crowned(shop, "2")
    code, lines = run(shop, labelled())
    assert code == 4 and lines[-1].startswith("Refused: it is worse on the recent rows and the golden set"), lines
    assert read_rollout(shop.root) is None and events(shop)[-1]["phase"] == "refused"
    assert [e["to"]["version"] for e in read_history(shop.root) if e["what"] == "champion"][-1] == "2"


def test_a_poisoned_batch_stays_out_and_a_new_truth_does_not(shop):
    before = {p: p.stat().st_mtime_ns for p in shop.root.rglob("*") if ".git" not in p.parts}
    code, lines = run(shop, labelled(flip=0.12), dry=True)
    assert code == 4 and "of the labels are wrong" in lines[-1], lines
    code, lines = run(shop, labelled(turned=True), dry=True)
    assert code == 0 and "the truth has changed" in lines[-2] and "Dry run" in lines[-1], lines
    (shop / "new.parquet").unlink()
    assert {p for p in before} == {p for p in shop.root.rglob("*") if ".git" not in p.parts} - {shop.root / ".mlkit/cache"}, "nothing is kept"
    code, lines = run(shop, labelled(flip=0.12))
    assert code == 4 and lines[-1].startswith("Quarantined: "), lines
    report, = (shop / QUARANTINE).glob("*.json")
    told, rows = read_json(report), pl.read_parquet(report.with_suffix(".parquet"))
    assert told["rows"] == len(rows) > 400 and told["requests"][0].startswith("r1-") and told["worst"][0][".rather"] in ("yes", "no")
    assert read_params(shop.root)["ingest"]["source"] != "grown://labelled" and events(shop)[-1]["phase"] == "quarantined"
    code, lines = run(shop, labelled(flip=0.12))
    assert code == 0 and "set aside before" in lines[-1] and lines[-1].startswith("Nothing to do: "), lines


def watch(project, *findings, **more):
    bundle = [e for e in read_history(project.root) if e["what"] == "champion"][-1]["to"]["bundle"][:12]
    found = [{"what": f, "severity": "alert", "text": f"{f} has moved", "do": "Look.", "since": "2026-11-22T00:00:00+00:00"} for f in findings]
    window = {"start": "2026-11-22T00:00:00+00:00", "end": "2026-11-23T00:00:00+00:00", "version": bundle, "status": "alert" if found else "calm", "findings": found}
    write_json(project / WATCH, {"model": "shop", "version": bundle, "windows": [window]} | more)


def test_only_what_training_mends(shop):
    with pytest.raises(DataError, match="watch.json is missing; run 'mlkit monitor' first"): run(shop, labelled(), when="drift")
    watch(shop, "covariate", model="zoo")
    with pytest.raises(DataError, match="watches model 'zoo'"): run(shop, labelled(), when="drift")
    watch(shop)
    assert run(shop, labelled(), when="quality")[0] == 0
    watch(shop, "unit")
    for _ in range(2): assert run(shop, labelled(), when="drift")[0] == 4
    assert len(events(shop)) == 1 and "training would teach the fault: unit has moved. Look." in events(shop)[0]["why"], "the same refusal is noted once"
    watch(shop, "concept")
    code, lines = run(shop, labelled(turned=True), when="quality", dry=True)
    assert code == 0 and "from before the truth changed" in lines[1] and "Audited" in lines[2], lines


def test_wrong_input(shop):
    for frame, words in ((labelled().drop("left"), "has no label"), (labelled().drop("age"), "no column 'age'")):
        with pytest.raises(DataError, match=words): run(shop, frame)
    code, lines = run(shop, labelled(40))
    assert code == 0 and "40 new labelled rows, 100 are needed" in lines[-1] and not (shop / STATE).exists()
    with pytest.raises(DataError, match="is no time"): run(shop, labelled(), since="yesterday")
    labels = pl.DataFrame({"request_id": ["who", "knows"], "label": ["yes", "no"]})
    labels.write_csv(shop / "labels.csv")
    shop.mlkit("label", "labels.csv")
    code, lines = run(shop)
    assert code == 0 and "0 new labelled rows" in lines[-1] and "2 labels of other requests" in lines[-1], lines
    write_state(shop.root, State("1", "zoo", {"version": "1", "bundle": "b"}).after("collected"))
    with pytest.raises(DataError, match="a retraining of zoo is under way"): run(shop, labelled())
    (shop / STATE).write_text("{}")
    one_line(shop.mlkit("retrain", "--when", "now", rc=1), "is no retraining; 'mlkit retrain --forget' drops it")
    assert "Forgotten" in shop.mlkit("retrain", "--forget").stdout and not (shop / STATE).exists()


def remembered(f):
    "Asked once: what both models say of the same rows."
    known = []
    def found(*args):
        known[:] = known or [f(*args)]
        return known[0]
    return found


def test_no_kill_makes_it_forget(shop, tmp_path, monkeypatch):
    "Killed before any change of a file, or in the midst of it, one retraining comes to the one end."
    crowned(shop, "1")
    labelled(300).write_parquet(shop / "new.parquet")
    monkeypatch.setattr(steps, "audit_batch", lambda rows, *_: SimpleNamespace(aside=np.zeros(len(rows), bool), text="sound", facts={}, new_truth=False))
    monkeypatch.setattr(steps, "asked", remembered(steps.asked))
    monkeypatch.setattr("mlkit.commands.rollout.expected_disagreement", lambda *_: (0.1, "for the test"))
    (into := tmp_path / "killed").mkdir()
    shutil.copyfile(tmp_path / "customers.csv", into / "customers.csv")
    with Moments(shop.root, into, (FETCHED, ".mlkit/compared")) as moments: assert run(shop, data="new.parquet")[0] == 0
    assert len(moments.seen) >= 40, moments.seen
    for at, what in list(moments.seen.items())[::1 if FULL else 2]:
        monkeypatch.chdir(at)
        again = replace(shop, root=at)
        over = (there := read_state(at)) is not None and there.over
        assert over or run(again, data="new.parquet")[0] == 0, what
        state, end = read_state(at), events(again)
        assert state.phase == "handed over" and [e["phase"] for e in end] == ["handed over"] and end[0]["retrain"] == state.id, what
        assert len([e for e in read_history(at) if e["what"] == "rollout" and e["event"] == 1]) == 1, what
        assert [b["file"] for b in read_json(at / "labelled/grown.json")["batches"]] == [f"{state.id}.parquet"], what


def photographed(folder, part, flip=0.0):
    "Digits of the checkout, each moved by a pixel, as a folder with a sub-folder a class; two of them are no use."
    digits, rng = load_digits(), np.random.default_rng(3)
    for i in rng.permutation(len(digits.target))[part]:
        label = (digits.target[i] + (1 + rng.integers(9)) * (rng.random() < flip)) % 10
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / f"{label}/{i}.png"), np.roll(digits.images[i] * 15.9, 1, 1).astype(np.uint8))
    (folder / "3/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert cv2.imwrite(str(folder / "4/large.png"), np.zeros((9, 8), np.uint8))
    return str(folder)


def test_images_too(project, tmp_path, monkeypatch):
    "New photos come in, are audited, held back, put behind the old ones and asked of both models; flipped labels lie where a person can mend them."
    monkeypatch.chdir(project.root)
    project.param(retrain__least=100)
    lines = []
    def run_with(data, **more): return retrain(project.root, "now", Edges(lambda root: 0, lambda bundle, why: ""), data, say=lines.append, **more)
    assert run_with(photographed(tmp_path / "poisoned", slice(500), flip=0.15)) == 4 and "of the labels are wrong" in lines[-1], lines
    table, = (project / QUARANTINE).glob("*/labels.csv")
    aside = pl.read_csv(table)
    assert len(aside) == 500 and aside["rather"][0] is not None and all((table.parent / f).is_file() for f in aside["file"])
    digits = load_digits() # a person mends the labels, and gives all of it back
    truth = {np.roll(x * 15.9, 1, 1).astype(np.uint8).tobytes(): y for x, y in zip(digits.images, digits.target)}
    right = [truth[cv2.imread(str(table.parent / f), cv2.IMREAD_GRAYSCALE).tobytes()] for f in aside["file"]]
    aside.with_columns(label=pl.Series(right)).write_csv(table)
    assert run_with(str(table.parent), dry=True) == 0 and "set aside before (--mended takes them)" in lines[-1], lines
    assert run_with(str(table.parent), dry=True, mended=True) == 0 and lines[-3].startswith("Collected: 500 new") and lines[-1].startswith("Dry run"), lines
    assert run_with(photographed(tmp_path / "new", slice(500, 1000))) == 0 and lines[-1] == "Nothing to do: the same model came out", lines
    assert "1 an image that is a PNG file that is damaged or cut short" in lines[-4] and "1 an image that has height 9 where the contract has 8" in lines[-4]
    end = events(project)[-1]["evidence"]
    before = read_index(project / "data/shards")
    after = write_shards(open_source("grown://labelled", project.root).images(), project / "data/shards")
    assert after.head(len(before)).equals(before) and len(after) == len(before) + end["audited"]["added"]
    kept, = (project / FOLDER).glob("*/held.parquet")
    bundle, contract = project / "models/bundle", load_contract(project / "data/contract.json")
    rows = recent_rows(project.root, pl.read_parquet(kept), contract, bundle, bundle)
    assert len(rows.y) == end["audited"]["held"] > 100 and (rows.mine.argmax(1) == rows.y).mean() > 0.5
    golden = read_golden(project / "golden.json")
    assert len(golden) == len(pl.read_parquet(project / "data/prepared/test.parquet"))
    assert run_with(str(tmp_path / "new"), dry=True) == 0
    added, held = end["audited"]["added"], end["audited"]["held"]
    collected = [line for line in lines if line.startswith("Collected")][-1]
    assert f"{held} new labelled images" in collected and f"{added} known from training" in collected and f"{held} twice in the batch" in collected, lines
    (table := tmp_path / "table.csv").write_text("a,label\n1,3\n2,4\n")
    with pytest.raises(DataError, match="is a table, and the model reads images"): run_with(str(table))
