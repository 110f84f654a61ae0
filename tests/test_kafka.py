"A Kafka topic as a source: librdkafka's mock broker in a process of its own, reached over TCP; no broker from elsewhere runs on a small machine."
import json, subprocess, sys
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime, timezone

import polars as pl
import pytest
from filelock import FileLock

from mlkit.sources import kafka as sources
from mlkit.core import DataError, SetupError
from mlkit.sources.registry import open_source

kafka = pytest.importorskip("confluent_kafka", reason="not run: no Kafka client (pip install -e '.[kafka]')")
BROKER = """
import sys
from confluent_kafka import Producer
p = Producer({"test.mock.num.brokers": 1, "log_level": 0})
b, = p.list_topics(timeout=300).brokers.values()
print(f"{b.host}:{b.port}", flush=True)
sys.stdin.read() # until its parent goes
"""

class Broker:
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", BROKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().strip()
        self.producer, self.url = kafka.Producer({"bootstrap.servers": self.address, "log_level": 0}), f"kafka://{self.address}"

    def send(self, topic, *values, partition=None, **kw):
        "A dict as JSON, all else as it is; turn by turn to four partitions."
        for i, v in enumerate(values): self.producer.produce(topic, json.dumps(v) if isinstance(v, dict) else v, partition=i % 4 if partition is None else partition, **kw)
        assert self.producer.flush(30) == 0

    def stop(self):
        self.process.kill(); self.process.wait(300); self.process.stdin.close(); self.process.stdout.close()

@pytest.fixture(scope="module")
def broker():
    b = Broker()
    try: yield b
    finally: b.stop()

@pytest.fixture
def project(tmp_path): (tmp_path / "params.yaml").touch(); return tmp_path

def rows(name, root): return pl.concat(open_source(name, root).rows(), how="diagonal_relaxed")

def says(f, *words, never=()):
    with pytest.raises(DataError) as e: f()
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words) and not any(w in str(e.value) for w in never), str(e.value)

def kept(project): return {p.name: p.read_bytes() for p in (project / ".mlkit/kafka").rglob("*") if p.is_file() and p.name != "lock"}

def test_a_topic_grows(broker, project):
    name = f"{broker.url}/grows"
    broker.send("grows", *({"n": i} for i in range(10)))
    first = rows(name, project)
    assert first["n"].to_list() == [0, 4, 8, 1, 5, 9, 2, 6, 3, 7] # by partition and offset
    before = kept(project)
    assert rows(name, project).equals(first) and kept(project) == before and len(before) == 2
    broker.send("grows", *({"n": i, "town": "Ulm"} for i in range(10, 14)))
    now = rows(name, project)
    assert now["n"].to_list() == first["n"].to_list() + [10, 11, 12, 13] and now["town"].to_list() == [None] * 10 + ["Ulm"] * 4 # new ones at the end, none twice
    assert kept(project)["000000.jsonl.zst"] == before["000000.jsonl.zst"]
    consumer = kafka.Consumer({"bootstrap.servers": broker.address, "group.id": "mlkit", "log_level": 0})
    assert {t.offset for t in consumer.committed([kafka.TopicPartition("grows", p) for p in range(4)], timeout=300)} == {kafka.OFFSET_INVALID} # nobody notices
    consumer.close()

def test_no_end_is_waited_for(broker, project):
    "What comes after the topic was opened belongs to the next fetch."
    broker.send("bounded", {"n": 1}, partition=0)
    found = open_source(f"{broker.url}/bounded", project)
    broker.send("bounded", {"n": 2}, {"n": 3})
    assert pl.concat(found.rows())["n"].to_list() == [1] and rows(f"{broker.url}/bounded", project)["n"].to_list() == [1, 2, 3]

def test_two_at_a_time(broker, project):
    "One opened it before the other, and fetches after it."
    broker.send("two", *({"n": i} for i in range(4)))
    early = open_source(f"{broker.url}/two", project)
    broker.send("two", {"n": 4})
    (project / ".mlkit/kafka").mkdir(parents=True); (early.folder / "tmpleft").mkdir(parents=True) # of one that was killed
    late = open_source(f"{broker.url}/two", project)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(late.folder / "lock"):
            job = pool.submit(lambda: sorted(pl.concat(late.rows())["n"]))
            assert not wait([job], timeout=1).done # another works there
        a = job.result(60)
    assert a == sorted(pl.concat(early.rows())["n"]) == [0, 1, 2, 3, 4] and not list(early.folder.glob("tmp*"))

def test_limit(broker, project):
    broker.send("many", *({"n": i} for i in range(16)))
    count = lambda options: len(rows(f"{broker.url}/many?{options}", project))
    assert count("limit=5") == 5 and count("limit=99") == 16
    broker.send("many", {"n": 16})
    assert count("limit=5") == 5 and count("limit=99") == 17

def test_start(broker, project, monkeypatch):
    "The mock broker has no index of times: what a real one would answer stands in for it."
    when = lambda year: int(datetime(year, 6, 1, tzinfo=timezone.utc).timestamp() * 1000)
    for year in (2020, 2024): broker.send("dated", *({"year": year} for _ in range(8)), timestamp=when(year))
    class Timed(kafka.Consumer):
        def offsets_for_times(self, asked, timeout): # two messages a partition and year
            return [kafka.TopicPartition(t.topic, t.partition, next((k for k, y in ((0, 2020), (2, 2024)) if when(y) >= t.offset), -1)) for t in asked]
    monkeypatch.setattr(kafka, "Consumer", Timed)
    found = lambda start: sorted(set(pl.concat([pl.DataFrame(schema={"year": pl.Int64}), *open_source(f"{broker.url}/dated?start={start}", project).rows()])["year"]))
    assert [found(s) for s in ("2020-01-31", "2020-06-01T02:00:01%2B02:00", "2024-06-01", "2024-06-02")] == [[2020, 2024], [2024], [2024], []]

def test_killed_between_file_and_note(broker, project, monkeypatch):
    broker.send("killed", *({"n": i} for i in range(4)))
    def die(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(sources, "write_json", die)
        with pytest.raises(KeyboardInterrupt): rows(f"{broker.url}/killed", project)
    assert sorted(kept(project)) == ["000000.jsonl.zst"] # written, but it does not count
    broker.send("killed", {"n": 4})
    assert sorted(rows(f"{broker.url}/killed", project)["n"]) == [0, 1, 2, 3, 4]

@pytest.mark.parametrize("value", [b"{", b"[1]", b"\x00\x00\x00\x00\x01avro", b'{"x": Infinity}', b"\xff"])
def test_a_message_that_is_no_row(broker, project, value):
    topic = f"bad{abs(hash(value))}"
    broker.send(topic, {"n": 1}, {"n": 2}, partition=2); broker.send(topic, value, None, {"n": float("nan")}, partition=2)
    says(lambda: rows(f"{broker.url}/{topic}", project), topic, "partition 2, offset 2 is not one JSON object", "bad=skip")
    assert kept(project) == {}
    found = open_source(f"{broker.url}/{topic}?bad=skip", project)
    assert pl.concat(found.rows())["n"].to_list() == [1, 2, None] and found.reasons[-1] == "left out: 2 messages: no row in them"

def test_topic_made_anew(broker, project):
    broker.send("anew", *({"n": i} for i in range(8)))
    rows(f"{broker.url}/anew", project)
    note = next((project / ".mlkit/kafka").rglob("kept.json"))
    note.write_text(note.read_text().replace('"1": 2', '"1": 9'))
    says(lambda: rows(f"{broker.url}/anew", project), "partition 1 ends at 2, but 9 was fetched", "made anew", "remove")

def test_outside_a_project_nothing_is_left(broker, tmp_path):
    broker.send("outside", {"n": 1})
    assert len(rows(f"{broker.url}/outside", tmp_path)) == 1 and list(tmp_path.iterdir()) == []

def test_wrong(broker, project, monkeypatch, tmp_path):
    broker.send("orders", {"n": 1})
    says(lambda: open_source(f"{broker.url}/order", project), "no topic 'order'; did you mean 'orders'?")
    says(lambda: open_source(f"kafka://me:s3cret@{broker.address}/orders", project), "take it out", "kcat.conf", never=["s3cret"])
    says(lambda: open_source(f"{broker.url}/orders?sasl.password=s3cret", project), "take it out", never=["s3cret"])
    (tmp_path / "kcat.conf").write_text("sasl.passwort=s3cret\n")
    monkeypatch.setenv("KCAT_CONFIG", str(tmp_path / "kcat.conf"))
    says(lambda: open_source(f"{broker.url}/orders", project), "sasl.passwort", "check ~/.config/kcat.conf", never=["s3cret"])
    monkeypatch.delenv("KCAT_CONFIG")
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(SetupError, match="pip install confluent-kafka"): open_source(f"{broker.url}/orders", project)

def test_the_broker_goes_down(project, capfd, monkeypatch):
    monkeypatch.setattr(sources, "WAIT", 2)
    b, name = Broker(), None
    try:
        name = f"{b.url}/down"
        b.send("down", *({"n": i} for i in range(4)))
        assert len(rows(name, project)) == 4
        b.send("down", {"n": 4})
        found = open_source(name, project)
    finally: b.stop()
    before = kept(project)
    says(lambda: list(found.rows()), name, "check")
    says(lambda: open_source(name, project), name, "Connection refused", "check host, port and the network")
    assert kept(project) == before
    says(lambda: open_source("kafka://no.such.host.invalid:9092/t", project), "no.such.host.invalid")
    assert capfd.readouterr().err == "" # librdkafka is quiet
