"Who is told: every rule fires on its fault and is silent when all is well; the real Prometheus and Alertmanager tell people."
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import psutil
import pytest
from conftest import wait_for
from prometheus_client import CollectorRegistry, generate_latest

from mlkit.core import write_json
from mlkit.flow.config import ALERTS, check
from mlkit.monitoring.dashboards import exprs
from mlkit.monitoring.delivery import PASSWORD, alertmanager_config
from mlkit.monitoring.metrics import GPU, WATCH, XID, Watched
from mlkit.monitoring.rules import Limits, RECORDED, rules, rules_file, to_yaml
from mlkit.monitoring.stack import FOLDER, SECRET, prometheus_config
from mlkit.serving.door import Gate
from mlkit.serving.gateway import Metrics
from mlkit.serving.request_log import LogSettings, RequestLog

INSTALLED = all(shutil.which(p) for p in ("prometheus", "promtool", "prometheus-alertmanager", "amtool"))
needs_prometheus = pytest.mark.skipif(not INSTALLED, reason="not run: the alerts; apt-get install prometheus prometheus-alertmanager")

# ---- every rule, by promtool: a calm world, and one fault in it ----

LIMITS = Limits(model_days=0.02, every=10) # half an hour, since promtool's time begins at 0
VERSION = 'model="shop",bundle="64478c78bfc8"'
SERVED = f'{VERSION},job="gateway",instance="s:1"'
ONE_GPU = 'gpu="0",Hostname="h",modelName="L4",job="mlkit",instance="m:1"'
N = 80 # minutes


def still(value): return f"{value}x{N}"
def grows(step, start=0): return f"{start}+{step}x{N}"


def requests(status="200", each=600, slow=0): # `slow`: of them take longer than a second
    "Series of a server; a minute has `each` requests of this status."
    of = f'{SERVED},status="{status}"'
    quick = each - slow
    buckets = {"0.05": quick * 0.985, "0.2": quick, "0.5": quick, "1": quick, "+Inf": each}
    counts = {f'mlkit_request_seconds_bucket{{{of},le="{le}"}}': grows(n) for le, n in buckets.items()}
    return counts | {f"mlkit_request_seconds_count{{{of}}}": grows(each)}


def triton(failed=0, seconds=0.01):
    of = 'model="shop",version="1",job="gateway",instance="s:1"'
    micros = {"request_duration": seconds * 1e6 * 600, "queue_duration": 1000 * 600}
    counts = {"request_success": 600, "request_failure": failed, "count": 900, "exec_count": 600}
    return {f"nv_inference_{k}{{{of}}}": grows(v) for k, v in counts.items()} | {f"nv_inference_{k}_us{{{of}}}": grows(v) for k, v in micros.items()}


def waits(seconds): # of each batch
    bounds = (0.0016, 0.0128, 0.1024, 0.8192, 6.5536)
    of = {f"{b}": grows(600 if seconds <= b else 0) for b in bounds} | {"+Inf": grows(600)}
    return {f'mlkit_queue_seconds_bucket{{{SERVED},le="{b}"}}': n for b, n in of.items()}


def found(what, severity="alert", column="age"):
    return {f'mlkit_finding{{model="shop",version="64478c78bfc8",what="{what}",column="{column}",severity="{severity}",job="mlkit",instance="m:1"}}': still(1)}


UP = 'up{job="gateway",instance="s:1",named="no"}'
START, READY = 'process_start_time_seconds{job="gateway",instance="s:1"}', f"mlkit_ready_workers{{{SERVED}}}"
DROPPED, FAILED = (f'mlkit_log_{k}_total{{job="gateway",instance="s:1"}}' for k in ("dropped_rows", "failed_writes"))
GUESSED = 'mlkit_refused_callers_total{why="guessing",job="gateway",instance="s:1"}'
OF_MONITOR = 'job="mlkit",instance="m:1"'
MADE, RELEASED = f'mlkit_watch_made_seconds{{model="shop",{OF_MONITOR}}}', f'mlkit_model_released_seconds{{model="shop",version="64478c78bfc8",{OF_MONITOR}}}'
TROUBLE, READABLE, NO_RESULT = f'mlkit_watch_trouble{{model="shop",{OF_MONITOR}}}', f"mlkit_watch_readable{{{OF_MONITOR}}}", f"mlkit_watch_failed{{{OF_MONITOR}}}"
UNSENT = 'alertmanager_notifications_failed_total{integration="webhook",job="alertmanager",instance="a:1"}'
TEMPERATURE, USED, FREE, LAST_XID = (f"DCGM_FI_DEV_{k}{{{ONE_GPU}}}" for k in ("GPU_TEMP", "FB_USED", "FB_FREE", "XID_ERRORS"))

CALM = {
    UP: still(1), f"up{{{OF_MONITOR}}}": still(1), START: still(5), READY: still(2), DROPPED: still(3), FAILED: still(0), GUESSED: still(40), UNSENT: still(2),
    **requests(), **requests("400", 30), **requests("503", 1), **requests("500", 1), **triton(failed=1), **waits(0.01),
    f"mlkit_batch_samples_sum{{{SERVED}}}": grows(900), f"mlkit_batch_samples_count{{{SERVED}}}": grows(600),
    **found("covariate", "watch"), MADE: grows(60), RELEASED: grows(60), TROUBLE: still(0), READABLE: still(1), NO_RESULT: still(0),
    TEMPERATURE: still(70), USED: still(20000), FREE: still(4000), LAST_XID: still(0),
}
FAULTS = { # alert: (what differs from the calm, minutes until it must fire); a tuple of names: they fire together
    "ServerDown": ({UP: f"1x20 0x{N}"}, 25),
    "NoWorkers": ({READY: still(0)}, 3),
    "ServerRestarts": ({START: grows(10, 5)}, 25),
    "RequestsFail": (requests("500", 12), 25),
    "ServerBusy": (requests("503", 12), 25),
    ("ServerSlow",): (requests("200", 600, slow=20), 25),
    "QueueLong": (waits(0.7), 25),
    "RequestsRefused": (requests("400", 300), 25),
    "TokensGuessed": ({GUESSED: grows(6)}, 25),
    "LogLosesRows": ({DROPPED: grows(1)}, 25),
    "TritonFails": (triton(failed=60), 25),
    "TritonSlow": (triton(seconds=0.6), 25),
    "DataBroken": (found("unit"), 2), "DataDrift": (found("covariate"), 2), "Skew": (found("skew"), 2), "AnswersShift": (found("answers"), 2),
    "QualityFell": (found("concept"), 2), "FeedbackLoop": (found("feedback"), 2), "ServiceWorse": (found("latency"), 2),
    "ModelStale": ({RELEASED: still(0)}, 35), "OtherFinding": (found("new"), 2),
    "MonitorFails": ({NO_RESULT: still(1)}, 2), "MonitorBlind": ({READABLE: still(0)}, 20), "MonitorLate": ({MADE: still(0)}, 30),
    "MonitorTrouble": ({TROUBLE: still(4)}, 65), "DeliveryFails": ({UNSENT: grows(1)}, 25),
    "GpuXid": ({LAST_XID: f"0x20 79x{N}"}, 25), "GpuLost": ({TEMPERATURE: "70x20 stale"}, 25), "GpuHot": ({TEMPERATURE: still(91)}, 25),
    "GpuMemoryFull": ({USED: still(23500), FREE: still(500)}, 25),
}
ALSO = { # alert: another fault of it
    "ServerDown": ({'up{job="gateway",instance="t:1",named="yes"}': still(0)}, 3), "LogLosesRows": ({FAILED: grows(1)}, 25),
    "DataBroken": (found("missing"), 2), "DataDrift": (found("category"), 2), "QualityFell": (found("quality"), 2),
}
NEVER = { # what must stay silent, though it looks like a fault: (what differs, minutes)
    "a server that nobody started": ({UP: still(0)}, 25),
    "a server without requests": ({s: still(0) for s in requests() | requests("400") | requests("500") | requests("503")}, 25),
    "a watched column": (found("unit", "watch"), 25),
    "a moment without an answer": ({UP: f"1x23 0 1x{N}"}, 25),
}


def world(name, changes, minutes, firing):
    "A test of promtool: what fires, of all alerts."
    series = [{"series": s, "values": v} for s, v in (CALM | changes).items()]
    samples = [{"labels": f'{{alertname="{a}"}}', "value": 1} for a in firing]
    asked = {"expr": 'count by (alertname) (max by (alertname) (ALERTS{alertstate="firing"}))', "eval_time": f"{minutes}m", "exp_samples": samples}
    return {"name": " and ".join(names(name)), "interval": "1m", "input_series": series, "promql_expr_test": [asked]}


def promtool(folder, tests, limits=LIMITS, change=lambda text: text):
    (folder / "rules.yml").write_text(change(to_yaml(rules_file(limits))))
    (folder / "tests.yml").write_text(to_yaml({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}))
    return subprocess.run(["promtool", "test", "rules", "tests.yml"], cwd=folder, capture_output=True, encoding="utf-8", timeout=300)


def names(key): return key if isinstance(key, tuple) else (key,)


def test_each_rule_has_its_fault():
    assert sorted(n for key in FAULTS for n in names(key)[:1]) == sorted(r.name for group in rules().values() for r in group)


@needs_prometheus
def test_every_rule_fires_on_its_fault_and_on_nothing_else(tmp_path):
    tests = [world("calm", {}, minutes, []) for minutes in (10, N - 1)]
    tests += [world(key, *fault, names(key)) for faults in (FAULTS, ALSO) for key, fault in faults.items()]
    tests += [world(name, *silent, []) for name, silent in NEVER.items()]
    done = promtool(tmp_path, tests)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@needs_prometheus
@pytest.mark.parametrize("old, new, name", [("mlkit_ready_workers == 0", "mlkit_ready_workers == 7", "NoWorkers"), ("> 0.25", "> 5", "ServerSlow"), ("unit|", "", "DataBroken"),
                                            ("_TEMP > 85", "_TEMP > 60", "calm")])
def test_a_wrong_rule_is_found(tmp_path, old, new, name):
    "The tests above can fail."
    fault = ({}, 25) if name == "calm" else next(f for key, f in FAULTS.items() if names(key)[0] == name)
    firing = [] if name == "calm" else [name]
    assert promtool(tmp_path, [world(name, *fault, firing)]).returncode == 0
    assert promtool(tmp_path, [world(name, *fault, firing)], change=lambda text: text.replace(old, new)).returncode == 1


@needs_prometheus
def test_the_files_are_what_their_programs_take(tmp_path):
    "All ways that alerts can go; every curve of a dashboard is PromQL."
    mail = {"to": "ann@example.com", "from": "mlkit@example.com", "smarthost": "mail.example.com:587", "user": "mlkit"}
    settings = check("alerts", {"webhook": "https://example.com/hook", "email": mail, "model_days": 30}, ALERTS)
    drawn = {"groups": [{"name": "drawn", "rules": [{"record": f"curve:{i}", "expr": expr} for i, expr in enumerate(exprs())]}]}
    config = prometheus_config("http://127.0.0.1:8003", "http://127.0.0.1:9093", "t", ["https://a.example:1/m", "http://127.0.0.1:2"], ["http://127.0.0.1:9400/metrics"])
    for name, value in {"rules.yml": rules_file(Limits(99.5, 0.001, 30, 0.1)), "drawn.yml": drawn, "prometheus.yml": config,
                        "alertmanager.yml": alertmanager_config(settings, "http://127.0.0.1:1/alerts", "t", {PASSWORD: "x: {"})}.items():
        (tmp_path / name).write_text(to_yaml(value))
    for command in (["promtool", "check", "rules", "rules.yml", "drawn.yml"], ["promtool", "check", "config", "prometheus.yml"], ["amtool", "check-config", "alertmanager.yml"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- what rules and dashboards ask for is exported ----

FINDING = {"what": "unit", "column": "age", "since": "2026-11-26T00:00:00+00:00", "severity": "alert", "text": "…", "do": "…", "effect": 5.2, "p": 1e-9}
WINDOW = {"start": "2026-11-26T00:00:00+00:00", "end": "2026-11-27T00:00:00+00:00", "version": "64478c78bfc8", "rows": 900, "labels": 20, "status": "alert", "findings": [FINDING],
          "columns": {"age": {"kind": "number", "distance": 5.2, "p": 1e-9, "drifted": True, "missing": 0.0, "invalid": 0.0}},
          "quality": {"metric": "accuracy", "value": 0.9, "lower": 0.85, "upper": 0.94, "estimated": 0.91, "n": 20}, "latency_ms": {"p50": 2.0, "p99": 30.0}, "errors": 0.0}


def watch(*findings):
    window = WINDOW | {"findings": list(findings), "status": "alert" if findings else "calm"}
    made = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    return {"model": "shop", "version": "64478c78bfc8", "made": made, "status": window["status"], "trouble": {}, "windows": [window]}


OF_OTHERS = {"up", "alertmanager_notifications_failed_total", "ALERTS", *(f"nv_inference_{k}" for k in (
    "request_success", "request_failure", "request_duration_us", "queue_duration_us", "count", "exec_count"))}


@pytest.fixture
def exported(tmp_path):
    "The texts of our exporters."
    queue = SimpleNamespace(n_waiting=0, n_ready=2, sizes=SimpleNamespace(buckets=lambda: [("+Inf", 1)], sum=1), waits=SimpleNamespace(buckets=lambda unit: [("+Inf", 1)], sum=1))
    metrics, model = Metrics(), SimpleNamespace(name="shop", bundle="64478c78bfc8", queue=queue)
    metrics.count(model, 1)
    metrics.seconds.labels("shop", "64478c78bfc8", "200").observe(0.01)
    Gate(None, metrics.registry).refused.labels("guessing")
    RequestLog(LogSettings(folder=str(tmp_path / "log")), metrics.registry, print)
    write_json(tmp_path / WATCH, watch(FINDING))
    registry, watched = CollectorRegistry(), Watched(tmp_path)
    watched.n_runs, watched.seconds, watched.failed = {"0": 1}, 2.0, 0.0
    registry.register(watched)
    return metrics.text([model]).decode(), generate_latest(registry).decode()


def test_each_name_is_exported(exported):
    there = {line.split("{")[0].split(" ")[0] for text in exported for line in text.splitlines() if not line.startswith("#")} | {*GPU, XID, *OF_OTHERS, *RECORDED}
    there |= {"mlkit_model_released_seconds"} # from a history, which this project lacks
    asked_for = [*RECORDED.values(), *(r.expr for group in rules(LIMITS).values() for r in group)]
    asked_for += exprs()
    asked = {name for e in asked_for for name in re.findall(r"\b(?:mlkit|nv|DCGM|process|alertmanager|triton)[_:][\w:]+|\bup\b", e)}
    assert len(asked) > 40 and asked <= there, asked - there


@needs_prometheus
def test_the_metrics_are_as_prometheus_wants_them(exported):
    for text in exported:
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, encoding="utf-8", timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- the real thing ----

class Post:
    "Webhook and mail server of somebody who is told."
    def __init__(self):
        self.alerts, self.mails, post = [], [], self
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                post.alerts += json.loads(self.rfile.read(int(self.headers["content-length"])))["alerts"]
                self.send_response(200)
                self.end_headers()
            def log_message(self, *_): pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.smtp = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/hook"
        self.smarthost = f"127.0.0.1:{self.smtp.getsockname()[1]}"
        for work in (self.http.serve_forever, self.take_mail):
            threading.Thread(target=work, daemon=True).start()

    def take_mail(self):
        while True:
            try:
                client, _ = self.smtp.accept()
            except OSError: # closed
                return
            with client, client.makefile("rw", encoding="utf-8", newline="\r\n") as f:
                def say(text):
                    f.write(f"{text}\r\n")
                    f.flush()
                say("220 test")
                for line in f:
                    if line.startswith("DATA"):
                        say("354 go on")
                        self.mails.append("".join(iter(f.readline, ".\r\n")))
                    say("221 bye" if line.startswith("QUIT") else "250 test")
                    if line.startswith("QUIT"):
                        break

    def firing(self, name):
        return next((a for a in self.alerts if a["labels"]["alertname"] == name and a["status"] == "firing"), None)


CODE = """
import sys
from pathlib import Path
from mlkit.monitoring.up import Where, run_until_told
run_until_told(Path(sys.argv[1]), Where([], [], seconds=0.5), 60, lambda line: print(line, flush=True), [sys.executable, "-c", "import time; time.sleep(600)"])
"""


@pytest.fixture
def up(tmp_path):
    "`monitor up` in a project, with a monitor that takes long."
    post = Post()
    email = {"to": "ann@example.com", "from": "mlkit@example.com", "smarthost": post.smarthost, "tls": False}
    (tmp_path / "params.yaml").write_text(to_yaml({"alerts": {"email": email}}))
    write_json(tmp_path / WATCH, watch())
    env = os.environ | {"MLKIT_ALERTS_WEBHOOK": post.url, "NO_PROXY": "*"}
    with open(tmp_path / "said", "w") as out:
        p = psutil.Popen([sys.executable, "-c", CODE, str(tmp_path)], env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
    p.said, p.post, p.root = lambda: (tmp_path / "said").read_text(), post, tmp_path
    try:
        wait_for(lambda: p.poll() is not None or "Alerts go to" in p.said(), "the start", 60)
        assert p.poll() is None, p.said()
        wait_for(lambda: len(p.children()) == 3, "the monitor", 10)
        yield p
    finally:
        family = [p, *p.children(recursive=True)] if p.is_running() and p.status() != psutil.STATUS_ZOMBIE else []
        for q in family:
            q.kill()
        p.wait(30)
        post.http.shutdown()
        post.smtp.close()


def child(p, name): return next((c for c in p.children() if name == c.name()), None)


def ask(p, query): # samples of Prometheus
    url = re.search(r"Prometheus at (\S+),", p.said())[1]
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?query={query}", timeout=5) as r:
            return json.load(r)["data"]["result"]
    except OSError:
        return []


@needs_prometheus
def test_a_fault_is_told_and_all_end_together(up):
    "By webhook, mail and file. Prometheus is killed and comes back. `kill -9` leaves nobody."
    wait_for(lambda: ask(up, 'mlkit_watch_status{status="calm"}==1'), "the first scrape", 60)
    assert up.post.firing("DataBroken") is None
    write_json(up.root / WATCH, watch(FINDING))
    alert = wait_for(lambda: up.post.firing("DataBroken"), "the alert", 60)
    assert alert["labels"] | {"column": "age", "what": "unit", "severity": "critical", "model": "shop"} == alert["labels"]
    assert alert["annotations"]["summary"] == "shop: the data that come in are broken (unit in 'age')." and "Ask whoever owns the source" in alert["annotations"]["do"]
    page = (up.root / FOLDER / "runbook.html").read_text(encoding="utf-8")
    assert alert["annotations"]["runbook"].endswith("runbook.html#DataBroken") and 'id="DataBroken"' in page
    mail = wait_for(lambda: next((m for m in up.post.mails if "DataBroken" in m), None), "the mail", 60)
    assert "Subject: FIRING: DataBroken (shop)" in mail and "To: ann@example.com" in mail
    file = up.root / ".mlkit/alerts.jsonl"
    lines = wait_for(lambda: file.exists() and [e for e in map(json.loads, file.read_text().splitlines()) if e["alert"] == "DataBroken"], "the line", 60)
    assert lines[0]["status"] == "firing" and lines[0]["labels"]["column"] == "age" and file.stat().st_mode & 0o077 == 0

    old = child(up, "prometheus")
    old.kill()
    new = wait_for(lambda: (c := child(up, "prometheus")) and c.pid != old.pid and c, "a new Prometheus", 30)
    wait_for(lambda: ask(up, 'mlkit_watch_status{status="alert"}==1'), "its first scrape", 60)
    assert new.is_running() and "prometheus ended (SIGKILL); it is started again" in up.said()

    family = up.children(recursive=True)
    assert sorted(c.name() for c in family)[:2] == ["prometheus", "prometheus-alertmanager"] and len(family) == 3, family
    up.kill()
    gone, left = psutil.wait_procs(family, timeout=20)
    assert not left


def status_of(url, path, origin="http://evil.example"):
    "As a web page of somebody asks."
    connection = HTTPConnection(url.split("//")[1], timeout=10)
    connection.request("GET", path, headers={"Origin": origin})
    answer = connection.getresponse()
    assert answer.status == 401 or "access-control-allow-origin" not in {k.lower() for k in answer.headers}
    connection.close()
    return answer.status


@needs_prometheus
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_it_is_told(up, signum):
    family = up.children(recursive=True)
    for path in (up.root / FOLDER).iterdir():
        assert path.suffix in (".log", "") or path.stat().st_mode & 0o077 == 0, path
    assert (up.root / FOLDER).stat().st_mode & 0o077 == 0
    url = (up.root / FOLDER / "alertmanager.url").read_text(encoding="utf-8")
    silenced = subprocess.run(["amtool", f"--alertmanager.url={url}", "silence", "add", "alertname=DataBroken", "-c", "test"], capture_output=True, timeout=60)
    assert silenced.returncode == 0 and status_of(url.replace(url.split("//")[1].split("@")[0] + "@", ""), "/api/v2/silences") == 401
    prometheus = re.search(r"Prometheus at (\S+),", up.said())[1]
    assert status_of(prometheus, "/api/v1/alerts", origin="http://evil.example") == 200 # but a page cannot read it: see `status_of`
    listening = {c.laddr.ip for q in family for c in q.net_connections("inet") if c.status == "LISTEN"}
    assert listening == {"127.0.0.1"}
    up.send_signal(signum)
    assert up.wait(60) == 0 and up.said().splitlines()[-1] == "stopped", up.said()
    assert not psutil.wait_procs(family, timeout=5)[1] and not [p for p in (up.root / FOLDER).iterdir() if p.name in SECRET]
