"A registered version of which one thing was changed is refused at every door: serve, promote, reproduce. And what a person does: promote, rollback, history."
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_line
from mlkit.commands.reproduce import fetch_version
from mlkit.registry.released import bundle_to_serve
from mlkit.core import MlkitError, write_json
from mlkit.registry.bundle import BUNDLE, MANIFEST, list_files, write_bundle
from mlkit.registry.history import HISTORY, read_history
from mlkit.registry.promotion import promote
from mlkit.registry.store import CHAMPION, read_champion
from mlkit.registry.signing import PUBLIC_FILE, SIGNATURE, load_key, new_keys, signature
from mlkit.registry.verdict import VERDICT
from mlkit.training.store import mlflow_client, tracking_uri
from test_registry import Shop, a_verdict, aliases, tables  # noqa: F401 (a fixture)


class Released(Shop):
    "A project whose registry holds two versions, the second the champion; with an engine, as a GPU leaves one."

    def released(self, text, value=0.97, name="digits"):
        shutil.rmtree(self.root / "models", ignore_errors=True)
        source, engines = self.root / "model.txt", self.root / "engines"
        source.write_text(text)
        engines.mkdir(exist_ok=True)
        (engines / "a.engine").write_text(f"engine of {text}")
        identity = write_bundle(self.root / BUNDLE, {"model.txt": source}, {"engines": engines})
        write_json(self.root / VERDICT, a_verdict(identity, value, name))
        return self

    @property
    def client(self):
        return mlflow_client(tracking_uri())

    def artifacts(self, version="2"):
        return self.root / "mlartifacts" / self.client.get_model_version("digits", version).run_id / "artifacts"

    @property
    def bundle(self):
        return self.artifacts() / "bundle"

    @property
    def verdict_file(self):
        found, = self.artifacts().glob("verdict-*/verdict.json")
        return found

    def rewrite_manifest(self):
        write_json(self.bundle / MANIFEST, list_files(self.bundle, {"engines"}))


@pytest.fixture
def registry(tmp_path, tables, monkeypatch):  # noqa: F811
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    shop = Released(tmp_path / "shop")
    monkeypatch.chdir(shop.root)
    shutil.copy(tables, shop.root / "mlflow.db")
    for text, value in (("one", 0.9), ("two", 0.95)):
        shop.released(text, value).publish()
    assert aliases(tracking_uri()) == {"champion": "2", "challenger": "2"}
    return shop


def change_json(path, **values):
    write_json(path, json.loads(path.read_text()) | values)


def no_verdict(r):
    shutil.rmtree(r.verdict_file.parent)


def red_verdict(r):
    change_json(r.verdict_file, released=False)


def verdict_of_other_bytes(r):
    change_json(r.verdict_file, bundle=read_history(r.root)[0]["to"]["bundle"])


def better_verdict(r):
    change_json(r.verdict_file, criteria={})


def file(r):
    (r.bundle / "model.txt").write_text("evil")


def file_and_manifest(r):
    file(r)
    r.rewrite_manifest()


def file_and_manifest_and_row(r):
    "What was accepted before there was a history."
    file_and_manifest(r)
    other = write_bundle(r.root / "other", {"model.txt": r.bundle / "model.txt"}, {})
    r.client.set_model_version_tag("digits", "2", "bundle", other)


def engine_and_manifest(r):
    "The identity of the bundle stays as it is."
    (r.bundle / "engines/a.engine").write_text("evil")
    r.rewrite_manifest()


def more_files(r):
    (r.bundle / "model.py").write_text("evil")


def link_in_the_bundle(r):
    (r.root / "elsewhere").write_text("two")
    (r.bundle / "model.txt").unlink()
    (r.bundle / "model.txt").symlink_to(r.root / "elsewhere")


def link_to_a_model_folder(r):
    (r.root / "elsewhere").mkdir()
    (r.root / "elsewhere/model.py").write_text("evil")
    (r.bundle / "evil").symlink_to(r.root / "elsewhere")


def bundle_is_a_link(r):
    moved = shutil.move(r.bundle, r.root / "elsewhere")
    r.bundle.symlink_to(moved)


def alias(r):
    "The row of the version stays; the alias points to the worse one."
    r.client.set_registered_model_alias("digits", "champion", "1")


def history_line(r):
    path = r.root / HISTORY
    path.write_text(path.read_text().replace('"value": 0.95', '"value": 0.99', 1))


def end_of_history(r):
    path = r.root / HISTORY
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))


def champion_file(r):
    change_json(r.root / CHAMPION, bundle="ab" * 32)


TAMPERS = [
    (no_verdict, "digits version 2: has no verdict"), (red_verdict, "digits version 2: its verdict does not release it"),
    (verdict_of_other_bytes, "digits version 2: its verdict speaks of bundle"), (better_verdict, "digits version 2: its verdict was changed"),
    (file, "model.txt: the file was changed or damaged"), (file_and_manifest, "digits version 2: its files and its bundle.json were changed"),
    (file_and_manifest_and_row, "history.jsonl knows of no release"), (engine_and_manifest, "digits version 2: its bundle.json was changed"),
    (more_files, "does not list 'model.py'"), (link_in_the_bundle, "model.txt: is a symbolic link"),
    (link_to_a_model_folder, "evil: is a symbolic link"), (bundle_is_a_link, "bundle: is a symbolic link"),
    (alias, "history.jsonl says that it is bundle"), (history_line, "line 5 does not follow: line 4 was changed"),
    (end_of_history, "history.jsonl: lines that it had"), (champion_file, "champion.json: names bundle abababababab"),
]


@pytest.mark.parametrize("tamper, says", TAMPERS, ids=[t.__name__ for t, _ in TAMPERS])
def test_one_thing_changed(registry, tamper, says):
    wanted = "champion" if tamper is alias else "2"
    doors = {
        "serve": lambda: bundle_to_serve(registry.root, wanted), "reproduce": lambda: fetch_version(registry.root, "digits", wanted),
        "promote": lambda: promote(registry.root, "digits", wanted, "shadow", "")}
    assert bundle_to_serve(registry.root, wanted).joinpath("model.txt").read_text() == "two"
    shutil.rmtree(registry.root / ".mlkit/fetched")
    tamper(registry)
    before = (registry.root / HISTORY).read_bytes()
    for door, enter in doors.items():
        with pytest.raises(MlkitError) as e:
            enter()
        assert says in str(e.value) and "\n" not in str(e.value), door
    assert (registry.root / HISTORY).read_bytes() == before and "shadow" not in aliases(tracking_uri())


@pytest.mark.parametrize("tamper", [file_and_manifest, engine_and_manifest, history_line, end_of_history, champion_file])
def test_a_publication_makes_no_truth_of_it(registry, tamper):
    "`mlkit release` after the change: the version is refused as before."
    tamper(registry)
    try:
        registry.publish(ask=True)
    except MlkitError:
        pass
    shutil.rmtree(registry.root / ".mlkit/fetched", ignore_errors=True)
    with pytest.raises(MlkitError):
        bundle_to_serve(registry.root, "2")


def test_a_copy_here_is_checked_too(registry):
    "What was fetched before lies in the project, where it can be changed as well; the registry's is whole."
    fetched = bundle_to_serve(registry.root, "2")
    for change in (file, engine_and_manifest, link_to_a_model_folder):
        class Here(Released):
            bundle = fetched
        shutil.rmtree(registry.root / "elsewhere", ignore_errors=True)
        change(Here(registry.root))
        again = bundle_to_serve(registry.root, "2")
        assert (again / "model.txt").read_text() == "two" and not (again / "evil").exists(), change
        assert (again / "engines/a.engine").read_text() == "engine of two", change


def no_signature(r):
    shutil.rmtree(r.artifacts() / "signature")


def signature_of_a_stranger(r):
    (r.artifacts() / "signature" / SIGNATURE).write_text(signature(r.bundle, load_key(new_keys()[0], "", True)))


def signature_of_other_files(r):
    shutil.copy(r.artifacts("1") / "signature" / SIGNATURE, r.artifacts() / "signature" / SIGNATURE)


def everything_but_the_key(r):
    "Files, list, row, verdict, history and champion.json, all rewritten by somebody who can write everywhere."
    (r.root / HISTORY).unlink()
    (r.root / CHAMPION).unlink()
    r.client.delete_model_version("digits", "2")
    r.released("evil", 0.99).publish(ask=True)
    shutil.copytree(r.artifacts("1") / "signature", r.artifacts("3") / "signature")


@pytest.mark.parametrize("tamper, says", [
    (no_signature, "digits version 2: is not signed"), (signature_of_a_stranger, "digits version 2: its signature was not made with the key"),
    (signature_of_other_files, "digits version 2: its signature is for other files"),
    (everything_but_the_key, "digits version 3: its signature is for other files"),
])
def test_a_signature(registry, monkeypatch, tamper, says):
    "With `signing.pub` in the project, what is not signed with that key is refused, whatever else fits."
    private, public = new_keys()
    monkeypatch.setenv("MLKIT_SIGNING_KEY", private.decode())
    for text, value in (("one", 0.9), ("two", 0.95)):
        registry.released(text, value).publish(ask=True)
    monkeypatch.delenv("MLKIT_SIGNING_KEY")
    (registry.root / PUBLIC_FILE).write_bytes(public)
    assert registry.got("2") == "two" and registry.got("champion") == "two"
    shutil.rmtree(registry.root / "got")
    tamper(registry)
    wanted = "3" if tamper is everything_but_the_key else "2"
    for enter in (lambda: bundle_to_serve(registry.root, wanted), lambda: fetch_version(registry.root, "digits", wanted),
                  lambda: promote(registry.root, "digits", wanted, "shadow", "")):
        with pytest.raises(MlkitError) as e:
            enter()
        assert says in str(e.value) and "\n" not in str(e.value)
    (registry.root / PUBLIC_FILE).unlink() # no key: nobody asks for a signature
    assert bundle_to_serve(registry.root, wanted).is_dir()


def test_commands(registry):
    "Promote, rollback and history as a person types them; a rollback takes less than 2 s of CPU, since MLflow is not imported."
    done = registry.command("promote", "1", "--to", "champion", "--why", "two is slow")
    assert "champion of digits was version 2" in done.stdout and "is version 1" in done.stdout, done.stderr
    assert read_champion(registry.root)["value"] == 0.9 and aliases(tracking_uri())["champion"] == "1"
    assert registry.publish(ask=True).champion is False, "the next run takes it back"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = registry.command("rollback", "2")
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime # what a busy machine does not change
    print(f"rollback: {wall:.1f} s, {cpu:.1f} s of CPU")
    assert "is version 2" in done.stdout and cpu < 2, (cpu, done.stderr)
    done = registry.command("rollback", "--why", "worse")
    assert "is version 1" in done.stdout, done.stderr
    done = registry.command("history")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [str(n + 1) for n in range(9)], done.stdout
    assert "two is slow" in done.stdout and done.stdout.splitlines()[-1].endswith("'rollback': worse")
    one_line(registry.command("rollback"), "no champion before the present one")
    one_line(registry.command("promote", "7", "--to", "shadow"), "no '7'", "there is 2, 1")
    file(registry)
    shutil.rmtree(registry.root / ".mlkit/fetched")
    one_line(registry.command("promote", "2", "--to", "shadow"), "changed or damaged")
    history_line(registry)
    one_line(registry.command("history"), "line 5 does not follow")


def test_a_rollback_does_not_import_mlflow(registry):
    "Its import takes seconds; the alias moves all the same."
    code = ("import sys; from pathlib import Path; from mlkit.registry.promotion import rollback\n"
            "print(rollback(Path.cwd(), 'digits', None, 'slow')['to']['version'], 'mlflow' in sys.modules)")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_"))} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=registry.root, env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["1", "False"], done.stderr
    assert aliases(tracking_uri()) == {"champion": "1", "challenger": "2"}
