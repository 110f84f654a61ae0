"`mlkit load` on real servers: what it finds, what it says, and what it refuses."
import json
import re
import time
from contextlib import contextmanager
from dataclasses import asdict
from threading import Thread

import psutil
import pytest
import uvloop
from click.testing import CliRunner
from test_gateway import hashes, shop
from test_traffic import identity

from mlkit.cli import main
from mlkit.commands.load import started
from mlkit.commands.serve import release_of, tuning_of
from mlkit.load.client import closed_loop, open_loop, server_of
from mlkit.load.requests import target_of
from mlkit.registry.verdict import VERDICT
from mlkit.serving.front import Front
from mlkit.serving.hosted import Tuning

QUICK = "{rate: 400, seconds: 0.3, p99_ms: 60000, errors: 0}" # a p99 that a busy machine keeps too


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A project with a released model; no stage has run."
    root = tmp_path_factory.mktemp("load")
    (root / "models").mkdir()
    made = shop(root / "made").rename(root / "models/bundle")
    (root / VERDICT).parent.mkdir(parents=True, exist_ok=True)
    (root / VERDICT).write_text(json.dumps({"released": True, "model": "shop", "bundle": identity(made), "criteria": {}}))
    return root


@pytest.fixture
def project(root, monkeypatch):
    "It, with a quick test; at the machine's other programs nobody looks."
    (root / "params.yaml").write_text(f"serve: {{name: shop}}\nload: {QUICK}\n")
    monkeypatch.chdir(root)
    monkeypatch.setattr("mlkit.load.measure.CLIENTS", (1, 4))
    monkeypatch.setattr("mlkit.load.measure.SHARES", (0.2,))
    for room in ("measure", "tune"):
        monkeypatch.setattr(f"mlkit.load.{room}.WARM_UP", 0.1)
    others(monkeypatch, 0.0)
    return root


@pytest.fixture(scope="module")
def front(root):
    bundle = root / "models/bundle"
    with Front(bundle, hashes(bundle), identity(bundle)[:12]) as front:
        yield front


def others(monkeypatch, share):
    "Let other programs seem to take this share of the machine."
    class Others:
        def __init__(self, server): self.share = share
        def __enter__(self): return self
        def __exit__(self, *_): pass
    monkeypatch.setattr("mlkit.load.measure.OthersWork", Others)


async def known_ceiling(): return 5000.0


def mlkit(*args): return CliRunner().invoke(main, list(map(str, args)))


def one_line(done, *words):
    lines = done.stderr.strip().splitlines()
    assert done.exit_code == 1 and len(lines) == 1 and lines[0].startswith("mlkit: "), done.output
    assert all(w in lines[0] for w in words), lines[0]


def test_a_server_that_runs(project, front):
    "It is found by its port, with its workers."
    done = mlkit("load", front.url)
    assert done.exit_code == 0 and "The promise holds: at 400 requests a second" in done.stdout, done.output
    found = json.loads((project / "reports/load.json").read_text())
    assert found["holds"] is True and found["model"] == "shop" and found["version"] == front.bundled.version
    assert found["promised"]["n"] == 120 and found["promised"]["statuses"] == {"200": 120}
    assert [level["load"] for level in found["closed"]] == [1, 4] and found["ceiling"] > 0
    assert found["points"][-1]["gateway_mb"] > 20 and found["points"][-1]["workers_mb"] > 20
    page = (project / "reports/load.html").read_text()
    assert "The promise holds" in page and page.count("<figure>") == 3 and page.count("<small>promised</small>") == 1


@contextmanager
def halted(process, after, seconds):
    "Stop a process for a while, soon."
    def halt():
        time.sleep(after)
        process.suspend()
        time.sleep(seconds)
        process.resume()
    thread = Thread(target=halt)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_halt_is_seen_by_all_who_would_have_asked(front):
    "A client of a closed loop waits politely, and sees it once."
    target, slow = target_of(front.url, "shop"), {}
    for name, loop, load in (("closed", closed_loop, 1), ("open", open_loop, 100)):
        with halted(psutil.Process(front.process.pid), 0.5, 1.0):
            level = uvloop.run(loop(target, load, 2.5))
        slow[name] = (level.latency > 250).sum()
        if name == "open":
            assert len(level.status) == 250 and level.errors == 0
            assert sorted(level.latency)[-3] > 700
    assert slow["closed"] < 10 and slow["open"] > 50, slow


REFUSING = """
import re, uvloop
from mlkit.load.client import Nothing, serve_nothing
METADATA = b'{"name": "m", "versions": ["1"], "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}], "outputs": []}'
class Refusing(Nothing):
    "Answers the first request; of the others every second."
    n = 0
    def data_received(self, data):
        path, status, body = data.split(b" ", 2)[1], b"200 OK", b"{}"
        if path.endswith(b"/infer"):
            Refusing.n += 1
            status = b"503 Busy" if Refusing.n % 2 == 0 else status
        elif path.rstrip(b"/").endswith(b"/m"):
            body = METADATA
        else:
            status, body = b"404 Not Found", b'{"error": "nothing here"}'
        self.transport.write(b"HTTP/1.1 %s\\r\\ncontent-length: %d\\r\\n\\r\\n%s" % (status, len(body), body))
uvloop.run(serve_nothing(Refusing))
"""


@pytest.mark.parametrize("share, code, said", [(0.0, 4, "The promise is broken"), (0.5, 3, "No verdict")])
def test_a_broken_promise(project, monkeypatch, share, code, said):
    "On a busy machine it is nobody's fault. The server is not ours, and tells no more than the shapes of its tensors."
    others(monkeypatch, share)
    monkeypatch.setattr("mlkit.load.measure.ceiling", known_ceiling)
    with server_of(REFUSING) as url:
        done = mlkit("load", url, "--model", "m")
    assert done.exit_code == code and said in done.stdout, done.output
    assert ("busy (other programs took 50% of its CPU time), so this is no verdict" in done.stdout) == (code == 3)
    promised = json.loads((project / "reports/load.json").read_text())["promised"]
    assert promised["statuses"].keys() == {"200", "503"} and promised["errors"] == pytest.approx(0.5, abs=0.02)


def test_refused_before_anything_is_sent(project, front, monkeypatch):
    one_line(mlkit("load", "http://127.0.0.1:9"), "http://127.0.0.1:9", "Connection refused")
    one_line(mlkit("load", front.url, "--model", "shoe"), "no model 'shoe'; there is 'shop'")
    one_line(mlkit("load", "nowhere"), "nowhere: no folder; name a project, or a server as http://HOST:PORT")
    one_line(mlkit("load", front.url, "--rate", "10"), "are 3, and a p99 takes 100; write seconds: 10")
    for wrong, why in (("load: {p99: 5}", "did you mean 'p99_ms'?"), ("load: {rate: fast}", "load.rate")):
        (project / "params.yaml").write_text(wrong)
        one_line(mlkit("load", front.url), "params.yaml", why)
    (project / "params.yaml").write_text(f"load: {QUICK}\ngateway: {{workers: 1}}")
    one_line(mlkit("load"), "gateway.workers: Input should be greater than or equal to 2")


def test_a_token_is_needed_and_given(project, tmp_path):
    from mlkit.serving.door import Access
    from mlkit.serving.tokens import add_token
    bundle, tokens = project / "models/bundle", tmp_path / "tokens.json"
    text = add_token(tokens, "load")
    with Front(bundle, hashes(bundle), identity(bundle)[:12], access=Access(str(tokens))) as front:
        one_line(mlkit("load", front.url), "401", "give a token that 'mlkit keys' made")
        assert target_of(front.url, "shop", text).headers == {"authorization": f"Bearer {text}"}
        assert uvloop.run(closed_loop(target_of(front.url, "shop", text), 2, 0.1)).errors == 0


def test_the_gateway_runs_as_params_say(project):
    (project / "params.yaml").write_text("gateway: {workers: 3, threads: 2, batch: 4, delay_ms: 1}")
    assert tuning_of(project) == Tuning(3, 2, 4, 1.0) and tuning_of(project, 5).workers == 5
    with started(release_of(project, None), tuning_of(project)) as front:
        workers = psutil.Process(front.process.pid).children()
        assert [w.cmdline()[-2] for w in workers] == ["2"] * 3 # before the user
        assert uvloop.run(closed_loop(target_of(front.url, "shop"), 8, 0.2)).errors == 0


def test_tune(project, monkeypatch):
    "Two settings, of which the one with more threads is taken for the better one, each time."
    async def confirmed(attempt, present, best):
        return [tuple({"tuning": asdict(t), "score": 1.0, "holds": True, "busy": 0.0} for t in (present, best))]
    monkeypatch.setattr("mlkit.load.tune.steps", lambda cores: {"threads": [2]})
    monkeypatch.setattr("mlkit.load.tune.confirmed", confirmed)
    monkeypatch.setattr("mlkit.load.tune.FAR", 0)
    monkeypatch.setattr("mlkit.load.measure.ceiling", known_ceiling)
    monkeypatch.setattr("mlkit.load.tune.better", lambda a, b: a["tuning"]["threads"] > b["tuning"]["threads"])
    done = mlkit("load", "--tune", "--write")
    assert done.exit_code == 0, done.output
    line = "gateway: {workers: 2, threads: 2, batch: null, delay_ms: 0}"
    assert f"Written to params.yaml: {line}" in done.stdout and re.search(r"^2 workers, 2 threads each .*/s  p99", done.stdout, re.M)
    assert (project / "params.yaml").read_text() == f"serve: {{name: shop}}\nload: {QUICK}\n{line}\n" and tuning_of(project).threads == 2
    found = json.loads((project / "reports/load.json").read_text())
    assert found["setting"]["threads"] == 2 and found["tuned"]["change"] and len(found["tuned"]["rows"]) == 2
    assert line in (project / "reports/load.html").read_text()
    assert not (project / ".mlkit/serve/requests").exists(), "pretended requests are in the log of production"
