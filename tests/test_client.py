"`mlkit.client` asks the real server: what a program has is taken, judged before it is sent, and asked again where that is safe."
import time
from threading import Thread

import numpy as np
import pandas as pd
import polars as pl
import pytest
from mlkit.client import Client
from mlkit.core import DataError, ServeError
from mlkit.serving.front import Front
from test_gateway import ROW, bundle, front, hashes # noqa: F401

ROWS = [ROW | {"age": age, "town": town} for age in range(0, 100, 5) for town in ("Bonn", "Ulm")] # more than the server takes at once


@pytest.fixture
def client(front): return Client(front.url, "shop", seconds=20)


def expected(row): return "yes" if row["age"] * (1 + (row["town"] == "Ulm")) > 50 else "no"


@pytest.mark.parametrize("form", [list, pl.DataFrame, pd.DataFrame, lambda rows: [{k: np.array(v)[()] for k, v in r.items()} for r in rows]])
def test_forms(client, form):
    answers = client.predict(form(ROWS))
    assert [a.answer for a in answers] == [expected(r) for r in ROWS]
    assert all(abs(sum(a.probabilities.values()) - 1) < 1e-6 and a.confidence == max(a.probabilities.values()) for a in answers)
    assert client.predict(ROW)[0] == client.predict([ROW])[0] and client.predict([]) == []
    assert client.predict(ROW | {"income": float("nan")})[0] == client.predict(ROW | {"income": None})[0]


def test_what_the_server_refuses(front, client, bundle, tmp_path):
    "With the contract at hand nothing is sent; without it the server says the same."
    model = front.bundled.model.with_name("signatures.json")
    (tmp_path / "contract.json").write_bytes((bundle / "contract.json").read_bytes())
    (tmp_path / "signatures.json").write_bytes(model.read_bytes())
    at_hand, sent = Client(client.url, "shop", contract=tmp_path), []
    at_hand.known() # the server was asked for what it takes at once
    at_hand.request = lambda *args: sent.append(args)
    for row in (ROW | {"age": 400}, ROW | {"town": "Paris"}, ROW | {"age": "old"}, {"age": 1}, ROW | {"x": 1}, ROW | {"age": None}):
        with pytest.raises(DataError) as theirs: client.predict([ROW, row])
        with pytest.raises(DataError) as ours: at_hand.predict([ROW, row])
        assert str(ours.value) == str(theirs.value) and not sent, row
    with pytest.raises(ServeError, match="no model 'other'"): Client(client.url, "other").predict(ROW)


def test_a_server_that_comes_later(bundle):
    "The first connections are refused; it is asked again until the server is there."
    first = Front(bundle, hashes(bundle), "v1")
    port = first.port
    first.stop()
    client, found = Client(f"http://127.0.0.1:{port}", "shop", attempts=12, seconds=60), []
    thread = Thread(target=lambda: found.extend(client.predict(ROW)))
    thread.start()
    time.sleep(0.3)
    with Front(bundle, hashes(bundle), "v1", port): thread.join(60)
    assert [a.answer for a in found] == [expected(ROW)]
