"A new version beside the one that serves, on a real server under load: good ones take its place, bad ones go, and no user notices."
import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPException
from threading import Event, Thread

import polars as pl
import psutil
import pytest
from test_gateway import ask, hashes, older_than, shop

from mlkit.registry.bundle import identity_of, read_manifest
from mlkit.registry.history import append, event
from mlkit.rollout.evidence import Allowed
from mlkit.rollout.file import order, read_state, started, write_state
from mlkit.rollout.state import OVER, Place, Plan, begin, promote_now
from mlkit.serving.door import Access
from mlkit.serving.front import Front, Release
from mlkit.serving.hosted import example_bundle
from mlkit.serving.request_log import LogSettings
from mlkit.serving.traffic import champion_left

def identity(bundle): return identity_of(read_manifest(bundle)["files"])

def damaged(repository):
    "A file that is no model, listed with its own hash."
    (repository / "shop/1/model.onnx").write_bytes(b"\x08\x0a no graph")

def not_a_number(helper, kinds):
    nodes, (w, b) = older_than(50)(helper, kinds)
    return nodes, [w, helper.make_tensor("b", kinds.FLOAT, [2], [float("nan")] * 2)]

def failing(helper, kinds):
    "Fails for whoever is 80 years or more, 40 in Ulm: more than every third of those who ask."
    nodes, weights = older_than(50)(helper, kinds)
    weights += [helper.make_tensor("eighty", kinds.FLOAT, [1], [80.0]), helper.make_tensor("known", kinds.FLOAT, [1], [0.0])]
    return [*nodes[:1], helper.make_node("Div", ["x", "eighty"], ["share"]), helper.make_node("Cast", ["share"], ["index"], to=kinds.INT64),
            helper.make_node("Gather", ["known", "index"], ["zero"]), helper.make_node("Add", ["z", "zero"], ["z0"]),
            helper.make_node("Add", ["z0", "b"], ["s"])], weights

def costly(layers):
    "The same answers, after some million multiplications a layer."
    def model(helper, kinds):
        nodes, weights = older_than(50)(helper, kinds)
        n = 1200
        weights += [helper.make_tensor("ones", kinds.FLOAT, [1, n], [0.0] * n), helper.make_tensor("square", kinds.FLOAT, [n, n], [0.0] * n * n),
                    helper.make_tensor("end", kinds.FLOAT, [n, 2], [0.0] * n * 2)]
        chain = [helper.make_node("MatMul", ["x", "ones"], ["h0"]), *(helper.make_node("MatMul", [f"h{i}", "square"], [f"h{i + 1}"]) for i in range(layers))]
        return [*nodes[:1], *chain, helper.make_node("MatMul", [f"h{layers}", "end"], ["nothing"]), helper.make_node("Add", ["z", "nothing"], ["z0"]),
                helper.make_node("Add", ["z0", "b"], ["s"])], weights
    return model

slow = costly(40)

def two_for_one(helper, kinds):
    "Two answers for each question."
    nodes, weights = older_than(50)(helper, kinds)
    return [*nodes[:1], helper.make_node("Concat", ["z", "z"], ["twice"], axis=0), helper.make_node("Add", ["twice", "b"], ["s"])], weights

@pytest.fixture
def root(tmp_path):
    "A project with version 1, and a server of it. Versions are added as `mlkit rollout start` would have fetched them."
    (tmp_path / ".mlkit").mkdir()
    shop(tmp_path / "1")
    return tmp_path

def version(root, number, **how):
    bundle = shop(root / number, **how)
    to = root / f".mlkit/fetched/shop/{number}/bundle"
    to.parent.mkdir(parents=True)
    shutil.copytree(bundle, to)
    return Place(number, identity(bundle))

@contextmanager
def serving(root, monkeypatch):
    monkeypatch.setattr("mlkit.serving.front.promote_in_registry", lambda root: lambda state: None) # there is no registry here
    bundle = root / "1/bundle"
    with Front(bundle, hashes(bundle), identity(bundle)[:12], root=root) as front:
        watching = Thread(target=lambda: front.watch(lambda line: None), daemon=True)
        watching.start()
        yield front
    watching.join(20)

@contextmanager
def users(front, n=4):
    "People who ask without a break; each answer must be that of somebody older than 50 or not, and none may fail."
    over, answers, wrong = Event(), [], []
    def one(seed):
        drawn = random.Random(seed)
        while not over.is_set():
            age = drawn.choice([drawn.uniform(0, 45), drawn.uniform(55, 120)])
            row = json.dumps({"age": age, "income": 1, "town": "Bonn"}).encode()
            right = front.right # a question may still be with a worse version when that one goes
            try: status, body = ask(front, "POST", "/predict", row)
            except (OSError, HTTPException): status, body = ask(front, "POST", "/predict", row) # its gateway was killed: a client asks once more
            answers.append((age, status))
            if status != 200: wrong.append((status, body))
            elif right and json.loads(body)["answer"] != ("yes" if age > 50 else "no"): wrong.append((age, body))
            time.sleep(0.002)
    front.right = True # whether each answer must be right; a worse version's are not
    with ThreadPoolExecutor(n) as pool:
        asking = [pool.submit(one, i) for i in range(n)]
        try: yield answers, wrong
        finally: over.set()
        for a in asking: a.result()

def rolled_out(root, candidate, stable, steps=(0.5, 1.0), least=20, seconds=60, **plan):
    "Start, and wait for the end."
    plan = Plan("shop", stable, candidate, steps=steps, every=0.0, least=least, patience=600.0, mirror=0.5, **plan)
    order(root, started(plan, "a test", ""))
    return over(root, seconds)

def over(root, seconds=60):
    end = time.monotonic() + seconds
    while (state := read_state(root)).phase not in OVER and time.monotonic() < end: time.sleep(0.05)
    return state

BAD = {"crash at load": dict(spoil=damaged), "NaN": dict(model=not_a_number), "10 points worse": dict(model=older_than(62)),
       "slower": dict(model=slow), "wrong shape": dict(model=two_for_one), "errors": dict(model=failing)}

def test_bad_versions_go_and_nobody_notices(root, monkeypatch):
    stable = Place("1", identity(root / "1/bundle"))
    with serving(root, monkeypatch) as front, users(front) as (answers, wrong):
        for i, (what, how) in enumerate(BAD.items(), 2):
            candidate = version(root, str(i), **how)
            front.right = what != "10 points worse"
            began = len(answers)
            state = rolled_out(root, candidate, stable, least=1000, allowed=Allowed(disagreement=0.01))
            wait(lambda: json.loads(ask(front, "GET", "/v2/models/shop")[1])["versions"] == ["1"]) # the file says it before the gateway has done it
            front.right = True
            assert state.phase == "rolled back", f"{what}: {state.phase}, {[e.why for e in state.events]}"
            assert len(answers) > began, "nobody has asked meanwhile"
            assert wrong == [], (what, wrong[:3])
        assert json.loads(ask(front, "GET", "/v2/models/shop")[1])["versions"] == ["1"]

def test_a_good_version_takes_the_place_and_a_kill_changes_nothing(root, monkeypatch):
    "Through its steps; by a person's word; and with every process of the server killed on the way."
    stable, names = Place("1", identity(root / "1/bundle")), []
    with serving(root, monkeypatch) as front, users(front) as (answers, wrong):
        for number, years in (("2", 50.5), ("3", 49.5), ("4", 50.0001)):
            candidate = version(root, number, model=older_than(years))
            if number == "2":
                state = rolled_out(root, candidate, stable)
            else:
                plan = Plan("shop", stable, candidate, steps=(0.5, 1.0), every=600.0, least=10, patience=6000.0)
                order(root, started(plan, "a test", ""))
                wait(lambda: read_state(root).phase == "running")
                if number == "4":
                    for worker in psutil.Process(front.process.pid).children(): worker.kill()
                    front.process.kill()
                    wait(lambda: b'"ready":true' in ask(front, "GET", "/v2/health/ready")[1])
                    wait(lambda: read_state(root).evidence.groups["candidate"].n > 0)
                order(root, lambda state: promote_now(state, "a test", "it is good", time.time()))
                state = over(root)
            assert state.phase == "promoted", [e.why for e in state.events]
            wait(lambda: json.loads(ask(front, "GET", "/v2/models/shop")[1])["bundle"] == candidate.bundle[:12])
            wait(lambda: front.bundled.version == candidate.bundle[:12])
            names.append(candidate.bundle[:12])
            stable = candidate
        assert wrong == [] and len(answers) > 200, wrong[:3]
        wait(lambda: len(psutil.Process(front.process.pid).children()) == 2) # the workers of the stable version are left
        wait(lambda: [p.name.split("-")[0] for p in front.bundled.folder.parent.iterdir() if p.is_dir()] == [names[-1]])

def test_several_models_at_once(root, tmp_path, monkeypatch):
    "Each has its own queue, workers and rollouts; what happens to one is nothing to the others."
    (tmp_path / "b").mkdir()
    monkeypatch.setattr("mlkit.serving.front.promote_in_registry", lambda root: lambda state: None)
    bundle, pets = root / "1/bundle", Release(*example_bundle(tmp_path / "b"))
    pixels = {"inputs": [{"name": "pixels", "shape": [1, 4], "datatype": "UINT8", "data": [1, 2, 3, 4]}]}
    with Front(bundle, hashes(bundle), identity(bundle)[:12], root=root, others=[pets]) as front:
        Thread(target=lambda: front.watch(lambda line: None), daemon=True).start()
        said = ask(front, "POST", "/v2/models/pets/infer", json.dumps(pixels).encode())
        assert said[0] == 200 and ask(front, "POST", "/predict", b"{}")[0] == 404
        row = json.dumps({"age": 41, "income": 1, "town": "Bonn"}).encode()
        assert json.loads(ask(front, "POST", "/predict/shop", row)[1])["answer"] == "no"
        candidate = version(root, "2", model=older_than(40))
        order(root, started(Plan("shop", Place("1", identity(bundle)), candidate, every=600.0, patience=6000.0), "a test", ""))
        wait(lambda: read_state(root).phase == "running")
        order(root, lambda state: promote_now(state, "a test", "it is good", time.time()))
        wait(lambda: json.loads(ask(front, "POST", "/predict/shop", row)[1])["answer"] == "yes")
        assert ask(front, "POST", "/v2/models/pets/infer", json.dumps(pixels).encode()) == said
        front.process.kill() # at once: the supervisor may not know yet what was promoted
        wait(lambda: json.loads(ask(front, "POST", "/predict/shop", row)[1])["answer"] == "yes")
        assert ask(front, "POST", "/v2/models/pets/infer", json.dumps(pixels).encode()) == said

def test_what_was_promoted_is_served_whatever_was_lost(root, monkeypatch):
    "The copy that the gateway had may be swept away before the supervisor looks."
    monkeypatch.setattr("mlkit.serving.front.promote_in_registry", lambda root: lambda state: None)
    bundle = root / "1/bundle"
    candidate, stable = version(root, "2", model=older_than(40)), Place("1", identity(bundle))
    with Front(bundle, hashes(bundle), identity(bundle)[:12], root=root) as front:
        state = begin(Plan("shop", stable, candidate), "a test", "", time.time())
        write_state(root, replace(state, phase="promoted"))
        front.conclude(0, print)
        assert front.bundled.version == candidate.bundle[:12] and front.bundled.model.is_file()


def test_the_champion_before_answers_the_holdout(root, monkeypatch):
    "The same users each time, and the log says so. One that was rolled back answers nobody."
    (root / "params.yaml").write_text("holdout: {share: 0.3, by: X-User}\n")
    before, now = version(root, "0", model=older_than(40)), Place("1", identity(root / "1/bundle"))
    def champion(place, old=None, command="promote"):
        to, was = ({"version": p.version, "bundle": p.bundle} if p else None for p in (place, old))
        append(root, [event("champion", "shop", to, "a test", command, was)])
    champion(before)
    champion(now, before)
    monkeypatch.setattr("mlkit.serving.front.promote_in_registry", lambda root: lambda state: None)
    bundle, log = root / "1/bundle", Access(log=LogSettings(str(root / "log")))
    row = json.dumps({"age": 45, "income": 1, "town": "Bonn"}).encode() # leaves, says the champion before; stays, says the present one
    def says(user): return json.loads(ask(front, "POST", "/predict", row, {"X-User": f"user {user}"})[1])["answer"]
    with Front(bundle, hashes(bundle), now.bundle[:12], root=root, access=log) as front:
        Thread(target=lambda: front.watch(lambda line: None), daemon=True).start()
        wait(lambda: ask(front, "GET", "/v2/models/shop/versions/2")[0] == 200)
        first, second = ([says(user) for user in range(60)] for _ in range(2))
        assert first == second and 8 < first.count("yes") < 30
    rows = pl.concat(pl.read_parquet(f, columns=["version", "answer", "held_out"]) for f in root.glob("log/*/*/*.parquet"))
    assert set(rows.rows()) == {(now.bundle[:12], "no", False), (before.bundle[:12], "yes", True)}
    assert rows["held_out"].sum() == 2 * first.count("yes")
    assert champion_left(root, "shop", now.bundle[:12]) == before and champion_left(root, "shop", before.bundle[:12]) is None
    champion(before, now, "rollback")
    assert champion_left(root, "shop", before.bundle[:12]) is None

def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within a minute"
        time.sleep(0.05)
