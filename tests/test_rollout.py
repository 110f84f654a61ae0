"A rollout: what its tests find, whom it sends where, and that no kill, clock or damaged file makes it forget."
import json, math, multiprocessing, os, random, signal, time
from dataclasses import replace

import pytest
from conftest import one_line
from mlkit.registry.history import read_history
from mlkit.rollout.evidence import Evidence, Fault, observed, record, record_mirrored
from mlkit.rollout.state import LONGEST_TICK, OVER, Place, Plan, RolloutError, abort, advance, assign, begin, mirrored, share_of
from mlkit.rollout.file import ROLLOUT, from_text, locked, order, read_state, started, tick, to_text

FORK = multiprocessing.get_context("fork")


def plan(**changes):
    return Plan("digits", Place("4", "4" * 64), Place("5", "5" * 64), **{"every": 60.0, "patience": 600.0} | changes)


def running(share=0.5, **changes): # a canary whose step has this share
    state = begin(plan(steps=(share, 1.0) if share < 1 else (1.0,), **changes), "Ann", "", 0.0)
    return advance(state, state.evidence, 1.0, "")[0]


# whom it sends where

@pytest.mark.parametrize("salt", ["a", "b", "c"])
def test_shares_are_right_and_nobody_leaves_the_candidate(salt):
    keys, before = [f"user-{i}" for i in range(20_000)], {}
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 1.0):
        state, again = running(share, salt=salt), running(share, salt=salt)
        got = {k: assign(state, k) for k in keys}
        for group, wanted in ("candidate", share), ("baseline", min(share, 1 - share)):
            n, sd = sum(g == group for g in got.values()), math.sqrt(len(keys) * wanted * (1 - wanted))
            assert abs(n - wanted * len(keys)) <= 4.5 * sd, f"{group} at {share}: {n}"
        assert all(got[k] == "candidate" for k, g in before.items() if g == "candidate")
        if share <= 0.5: assert all(got[k] == "baseline" for k, g in before.items() if g == "baseline")
        assert got == {k: assign(again, k) for k in keys} # again, as another process would
        before = got


def test_another_rollout_draws_other_users():
    keys = [f"user-{i}" for i in range(5000)]
    states = [running(0.1, salt=s) for s in ("a", "b")]
    both = [[assign(state, k) == "candidate" for k in keys] for state in states]
    assert 10 < sum(a and b for a, b in zip(*both)) < 110 # 50 by chance


@pytest.mark.parametrize("phase", ["checking", "rolled back", "aborted"])
@pytest.mark.parametrize("mode", ["canary", "ab", "shadow"])
def test_nobody_gets_a_candidate_that_is_not_checked_or_is_gone(mode, phase):
    state = replace(begin(plan(mode=mode), "Ann", "", 0.0), phase=phase)
    assert {assign(state, str(i)) for i in range(2000)} == {"stable"}
    assert not any(mirrored(state, str(i)) for i in range(2000))


def test_a_shadow_never_answers():
    state = advance(begin(plan(mode="shadow"), "Ann", "", 0.0), Evidence(), 1.0, "")[0]
    assert state.phase == "running" and {assign(state, str(i)) for i in range(2000)} == {"stable"} and mirrored(state, "1")


# six bad versions, and the same one again

class Traffic:
    "Users who ask two versions, in simulated time; the load has spikes, the latency heavy tails."
    def __init__(self, seed, fault, rate=50):
        self.rng, self.fault, self.rate, self.load, self.n, self.seen = random.Random(seed), fault, rate, 1.0, 0, {"stable": 0, "failed": 0}

    def answer(self, fault, truth): # as `record` takes it
        seconds = 0.004 * self.load * fault.slower * self.rng.paretovariate(1.5)
        wrong = (truth + 1) % 10 if self.rng.random() < fault.wrong else truth
        confidence = math.nan if self.rng.random() < fault.nan else 0.5 + self.rng.random() / 2
        return (500 if self.rng.random() < fault.errors else 200), seconds, wrong, confidence

    def second(self, state):
        for _ in range(self.rate):
            self.n += 1
            self.load = 20.0 if self.rng.random() < 0.003 else 1 + 0.97 * (self.load - 1)
            truth, group = self.rng.randrange(10), assign(state, str(self.n))
            of = [Fault(errors=0.001), self.fault]
            own = self.answer(of[group == "candidate"], truth)
            record(state.evidence, group, *own)
            if group != "stable" and mirrored(state, str(self.n)):
                pair = observed(*own), observed(*self.answer(of[group != "candidate"], truth))
                record_mirrored(state.evidence, *(pair[::-1] if group == "candidate" else pair))


def played(seed, fault, golden="", seconds=3000, **changes): # the last state; requests of the candidate in its last step; seconds
    state, traffic, now = begin(plan(steps=(0.1, 0.5, 1.0), **changes), "Ann", "", 0.0), Traffic(seed, fault), 1000.0
    while state.phase not in (*OVER, "promoting") and now < 1000 + seconds:
        now += 1
        if state.phase == "running": traffic.second(state)
        before = state.evidence.groups["candidate"].n
        state, _ = advance(state, state.evidence, now, golden)
    return state, before, now - 1000


@pytest.mark.parametrize("name, fault, golden, most", [
    ("crash at load", Fault(), None, 0), ("other golden answers", Fault(), "class 3 instead of 5", 0), ("NaN", Fault(nan=1.0), "", 60),
    ("wrong shape", Fault(errors=1.0), "", 60), ("20 % errors", Fault(errors=0.2), "", 250), ("5x slower", Fault(slower=5.0), "", 150),
    ("10 points worse", Fault(wrong=0.1), "", 3000)])
def test_a_bad_version_is_rolled_back(name, fault, golden, most):
    for seed in range(3):
        state, n, seconds = played(seed, fault, golden)
        assert state.phase == "rolled back" and share_of(state) == 0 and state.events[-1].who == "mlkit", f"{name}: {state.phase}"
        assert n <= most, f"{name}: {n} users got it"
        if golden == "": assert "no data" not in state.events[-1].why


def test_a_bad_version_is_gone_within_a_minute():
    "Of the six, at 50 requests a second; without labels the one that is 10 points worse takes longer."
    for fault in Fault(nan=1.0), Fault(errors=1.0), Fault(errors=0.2), Fault(slower=5.0):
        assert all(played(seed, fault)[2] < 60 for seed in range(3)), fault


def test_other_answers_are_counted_over_all_steps():
    state = running(0.5, least=10)
    for now in range(2, 70):
        for group in "baseline", "candidate": record(state.evidence, group, 200, 0.01)
        record_mirrored(state.evidence, observed(200, 0.01, 1), observed(200, 0.01, 1 + (now % 50 == 0)))
        state, _ = advance(state, state.evidence, float(now))
    assert state.step == 1 and state.evidence.groups["baseline"].n < 20
    assert state.evidence.counts["disagreement"] == [1, 68] and state.evidence.counts["mirrored_latency"][1] < 20


def test_the_same_version_is_promoted():
    for seed in range(15):
        state, _, _ = played(seed, Fault(errors=0.001))
        assert state.phase == "promoting", state.events[-1].why


def test_what_hits_both_groups_is_nobodys_fault():
    "Half of all requests fail for a while, and all are ten times as slow, in both groups."
    for seed in range(10):
        rng, state = random.Random(seed), running()
        for i in range(3000):
            outage = i % 1000 > 700
            group = rng.choice(("baseline", "candidate"))
            record(state.evidence, group, 500 if outage and rng.random() < 0.5 else 200, (0.05 if outage else 0.005) * rng.paretovariate(1.2), i % 3, 0.9)
            state, _ = advance(state, state.evidence, 1.0 + i / 100)
            assert state.phase == "running", state.events[-1].why


# no data, and clocks

def test_no_data_stops():
    state = running()
    for now in range(2, 700): state, _ = advance(state, state.evidence, float(now))
    assert state.phase == "rolled back" and state.events[-1].why.startswith("no data: after 10 minutes it would go on when 100 more")
    state, now = running(0.1), 1.0
    for i in range(2, 700):
        for _ in range(10): record(state.evidence, "stable", 200, 0.01) # none reaches the candidate
        state, events = advance(state, state.evidence, float(i))
        if events: break
    assert state.phase == "rolled back" and i < 60 and "none was answered by the candidate" in state.events[-1].why


@pytest.mark.parametrize("seed", range(5))
def test_no_clock_makes_a_step_shorter(seed):
    "Time goes backwards, stands still, jumps by years; a step still takes its time."
    rng, state, now, true = random.Random(seed), running(), 1.0, 0.0
    for group in "baseline", "candidate":
        for _ in range(500): record(state.evidence, group, 200, 0.01)
    while state.step == 0 and state.phase == "running" and true < 10_000:
        true += 1
        now += rng.choice((1.0, 1.0, 0.0, -5.0, -1e6, 1e9))
        before, (state, _) = state.elapsed, advance(state, state.evidence, now)
        if state.step == 0: assert 0 <= state.elapsed - before <= LONGEST_TICK
    assert state.step == 1, state.events[-1].why


# kills, damaged files, two at once

def follow(root): # a server that knows nothing but the file, in a hurry
    def promote(state):
        time.sleep(0.01)
        with open(root / "promoted", "a", encoding="utf-8") as f: f.write(state.plan.candidate.version)
    held, now = None, max(read_state(root).last, 1.0)
    while True:
        now += 1.0
        held = tick(root, held, now, "", promote)
        for group in "baseline", "candidate": record(held.evidence, group, 200, 0.01, 3, 0.9)
        record_mirrored(held.evidence, observed(200, 0.01, 3), observed(200, 0.01, 3))
        if held.phase in OVER: return


def test_kill_at_any_moment(tmp_path):
    "SIGKILL, again and again: the file is whole each time, nothing that was decided is forgotten, the history has each event once."
    rng, known, n = random.Random(0), (), 0
    order(tmp_path, started(plan(steps=(0.1, 0.5, 1.0), every=100.0, least=20, patience=40_000.0), "Ann", "", 0.0))
    while (state := read_state(tmp_path)).phase not in OVER and n < 300:
        assert state.events[:len(known)] == known
        known, n = state.events, n + 1
        server = FORK.Process(target=follow, args=(tmp_path,))
        server.start()
        time.sleep(rng.uniform(0.01, 0.08))
        os.kill(server.pid, signal.SIGKILL)
        server.join()
        read_history(tmp_path) # whole, too
    assert n > 3 and state.phase == "promoted" and set((tmp_path / "promoted").read_text()) == {"5"}
    order(tmp_path, started(plan(), "Bo", "")) # brings the history up to date, and is not kept out by the dead
    lines = [(e["rollout"], e["event"]) for e in read_history(tmp_path)]
    assert [e for r, e in lines if r == state.plan.salt] == [e.n for e in state.events]
    assert [e.what for e in state.events] == ["started", "step", "step", "step", "promoting", "promoted"]
    assert not list((tmp_path / ".mlkit").glob(".rollout*.tmp"))


def die_at(n, after): # the process ends at its n-th `os.replace`, before or after the file is there
    real, left = os.replace, [n]
    def replace(*args):
        left[0] -= 1
        if after: real(*args)
        if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        if not after: real(*args)
    os.replace = replace


@pytest.mark.parametrize("n, after", [(2, True), (3, False), (3, True), (4, False), (4, True)])
def test_kill_at_each_write(tmp_path, n, after):
    "Each server dies at its n-th write, just before or just after: state, history, state, ..."
    def serve():
        die_at(n, after)
        follow(tmp_path)
    order(tmp_path, started(plan(steps=(0.5, 1.0), every=3.0, least=1, patience=40_000.0), "Ann", "", 0.0))
    for lives in range(300):
        if read_state(tmp_path).phase in OVER: break
        server = FORK.Process(target=serve)
        server.start()
        server.join()
    state = read_state(tmp_path)
    order(tmp_path, started(plan(), "Bo", ""))
    assert [e["event"] for e in read_history(tmp_path) if e["rollout"] == state.plan.salt] == [e.n for e in state.events] and lives > 3
    assert [e.what for e in state.events] == ["started", "step", "step", "promoting", "promoted"]


def try_to_start(root, name, barrier, results):
    barrier.wait()
    try: results.put((name, order(root, started(plan(salt=name), name, "")).plan.salt))
    except RolloutError as e: results.put((name, str(e)))


def test_two_starts_at_once(tmp_path):
    barrier, results, names = FORK.Barrier(6), FORK.Queue(), [f"salt{i}" for i in range(6)]
    processes = [FORK.Process(target=try_to_start, args=(tmp_path, name, barrier, results)) for name in names]
    for p in processes: p.start()
    said = dict(results.get(timeout=300) for _ in names)
    for p in processes: p.join()
    winners = [name for name in names if said[name] == name]
    assert winners == [read_state(tmp_path).plan.salt] and len(read_history(tmp_path)) == 1
    assert all("a rollout of version 5 is checking" in said[name] for name in names if name not in winners)


def test_a_held_lock_is_named(tmp_path):
    with locked(tmp_path):
        process = FORK.Process(target=lambda: locked(tmp_path, 0.1).__enter__())
        process.start()
        process.join()
        assert process.exitcode == 1


def test_a_damaged_file_is_one_line(tmp_path):
    "Cut anywhere, or with any byte changed, it is a state or a `RolloutError`, and never decides anything else."
    state = running()
    record(state.evidence, "baseline", 200, 0.01, 3, math.nan)
    whole, rng = to_text(state), random.Random(0)
    assert from_text(whole, "x").evidence.counts == state.evidence.counts
    broken = [whole[:i] for i in range(0, len(whole) - 1, 97)]
    for _ in range(400):
        at = rng.randrange(len(whole))
        broken.append(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1:])
    for text in broken:
        try: found = from_text(text, "x")
        except RolloutError as e: assert str(e).count("\n") == 0 and "abort --force" in str(e)
        else: advance(found, found.evidence, 5.0)
    (tmp_path / ".mlkit").mkdir()
    (tmp_path / ROLLOUT).write_bytes(whole[:-100])
    for act in (lambda: read_state(tmp_path), lambda: tick(tmp_path, None, 5.0), lambda: order(tmp_path, started(plan(), "Ann", ""))):
        with pytest.raises(RolloutError, match="is no rollout"): act()


@pytest.mark.parametrize("path, value", [
    ("evidence counts errors", [5, 2]), ("evidence counts errors", [-1, 2]), ("evidence counts errors", []), ("evidence classes", [[0, 0]]),
    ("evidence groups stable seconds", [1]), ("evidence groups stable failed", 7), ("step", -1), ("plan steps", [2.0]), ("plan steps", []),
    ("phase", "king"), ("events", []), ("noted", 9), ("plan salt", ""), ("plan mode", "x"), ("plan every", "1"), ("plan", None)])
def test_a_forged_file_is_refused(path, value):
    whole = json.loads(to_text(running()))
    at = whole["state"]
    *keys, last = path.split()
    for key in keys: at = at[key]
    assert last in at
    at[last] = value
    with pytest.raises(RolloutError): from_text(json.dumps(whole).encode(), "x")


def test_an_order_reaches_a_server_that_counts(tmp_path):
    "A person aborts while the server holds a state of its own: the person wins."
    order(tmp_path, started(plan(), "Ann", "", 0.0))
    held = tick(tmp_path, None, 1.0, "")
    record(held.evidence, "candidate", 200, 0.01)
    order(tmp_path, lambda state: abort(state, "Bo", "too slow", 2.0))
    held = tick(tmp_path, held, 3.0, "")
    assert held.phase == "aborted" and assign(held, "k") == "stable" and read_state(tmp_path).events[-1].who == "Bo"


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    order(tmp_path, started(plan(), "Ann", "", 0.0))
    before = (tmp_path / ROLLOUT).read_bytes()
    def full(*_): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr("mlkit.core.os.fsync", full)
        with pytest.raises(OSError): tick(tmp_path, None, 1.0, "")
    assert (tmp_path / ROLLOUT).read_bytes() == before and tick(tmp_path, None, 2.0, "").phase == "running"


# the command, on a finished project

def test_versions_that_cannot_be_rolled_out(project):
    one_line(project.mlkit("rollout", "start", "99", rc=1), "no '99'", "there is 1")
    one_line(project.mlkit("rollout", "start", "king", rc=1), "no 'king'")
    one_line(project.mlkit("rollout", "start", "champion", rc=1), "is the stable version already")
    one_line(project.mlkit("rollout", "status", rc=1), "there is no rollout")
    assert not (project / ROLLOUT).exists() and not (project / "reports/rollout.html").exists()
