"A promotion, or a rollback, while a server of the project runs: it answers with the champion, and no request fails. A real registry, a real server."
import json
import shutil
from threading import Thread

import pytest
from test_gateway import ask, hashes, older_than, shop as a_bundle
from test_registry import Shop, a_verdict, tables  # noqa: F401 (a fixture)
from test_traffic import damaged, identity, root, users, version, wait  # noqa: F401 (a fixture)

from mlkit.core import ServeError, write_atomic, write_json
from mlkit.registry.bundle import BUNDLE
from mlkit.registry.history import append, event, read_history
from mlkit.registry.verdict import VERDICT
from mlkit.rollout.state import Place
from mlkit.rollout.swap import served_here, swap
from mlkit.serving.front import Front

FORTY_ONE = json.dumps({"age": 41, "income": 1, "town": "Bonn"}).encode()


def released(shop, number, **how):
    "A version of a table's model in the registry, and in the project as the last run's."
    bundle = a_bundle(shop.root / f"made/{number}", **how)
    shutil.rmtree(shop.root / BUNDLE, ignore_errors=True)
    shutil.copytree(bundle, shop.root / BUNDLE)
    write_json(shop.root / VERDICT, a_verdict(identity(bundle), 0.9 + number / 1000))
    shop.publish()
    return Place(str(number), identity(bundle))


def answer(front): return json.loads(ask(front, "POST", "/predict", FORTY_ONE)[1])["answer"]


def test_a_rollback_reaches_the_server(tmp_path, tables, monkeypatch):  # noqa: F811
    "And a promotion after it; a kill of the gateway between the two changes nothing."
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mlkit.training.store.make_database", lambda db: write_atomic(db, tables.read_bytes()))
    shop = Shop(tmp_path / "shop")
    monkeypatch.chdir(shop.root)
    one, two = released(shop, 1), released(shop, 2, model=older_than(40))
    with Front(shop.root / BUNDLE, hashes(shop.root / BUNDLE), two.bundle[:12], root=shop.root) as front:
        watching = Thread(target=lambda: front.watch(lambda line: None), daemon=True)
        watching.start()
        with users(front) as (answers, _):
            front.right = False # the two differ
            assert answer(front) == "yes" and served_here(shop.root) == two.bundle[:12]
            done = shop.command("rollback", "--model", "digits", "--why", "too many leave")
            assert done.returncode == 0 and f"Server: answers with version 1 ({one.bundle[:12]}) now, and answered with version 2 before" in done.stdout, done.stdout + done.stderr
            wait(lambda: answer(front) == "no")
            wait(lambda: served_here(shop.root) == one.bundle[:12])
            front.process.kill() # what the next gateway starts with is the champion too
            wait(lambda: answer(front) == "no")
            done = shop.command("promote", "2", "--to", "champion", "--model", "digits")
            assert done.returncode == 0 and "Server: answers with version 2" in done.stdout, done.stdout + done.stderr
            wait(lambda: answer(front) == "yes" and served_here(shop.root) == two.bundle[:12])
        assert {status for _, status in answers} == {200} and len(answers) > 100
    watching.join(20)
    assert served_here(shop.root) == ""
    crowned = [(e["to"]["version"], e["command"]) for e in read_history(shop.root) if e["what"] == "champion"]
    assert crowned == [("1", "release"), ("2", "release"), ("1", "rollback"), ("2", "promote")]


def test_a_champion_that_cannot_answer_does_not_take_the_place(root):  # noqa: F811
    "The command says why in a line, and the server goes on as before."
    one, two = Place("1", identity(root / "1/bundle")), version(root, "2", spoil=damaged)
    append(root, [event("released", "shop", {"version": p.version, "bundle": p.bundle}, "", "release") for p in (one, two)])
    with Front(root / "1/bundle", hashes(root / "1/bundle"), one.bundle[:12], root=root) as front:
        Thread(target=lambda: front.watch(lambda line: None), daemon=True).start()
        with pytest.raises(ServeError, match="version 2 is champion; the server that runs here keeps bundle .*: .*ONNX Runtime cannot load it") as e:
            swap(root, "shop", two, "a test", "")
        assert "\n" not in str(e.value) and answer(front) == "no" and served_here(root) == one.bundle[:12]
