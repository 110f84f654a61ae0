"Commands that a person gives by hand, on the finished project."
import json, signal, urllib.request

import pytest

from conftest import FULL, one_line, sha256, wait_for

@pytest.mark.parametrize("engine", ["onnxruntime", "triton"])
def test_serve_answers_and_ends(project, engine):
    "`mlkit serve` serves the released bundle, as its own example asks, until it is told to end."
    if engine == "triton": pytest.importorskip("grpc")
    with project.started("mlkit", "serve", "--engine", engine, "--port", "0", "--metrics-port", "0") as p:
        line = wait_for(lambda: next((l for l in p.out.read_text().splitlines() if l.startswith("Try: ")), None), "the server")
        *_, file, url = line.split()
        with urllib.request.urlopen(urllib.request.Request(url, open(file.removeprefix("@"), "rb").read())) as answer: said = json.load(answer)
        assert said["answer"] in said["probabilities"] and abs(sum(said["probabilities"].values()) - 1) < 1e-4
        p.send_signal(signal.SIGINT)
        assert p.wait(300) == 0 and "stopped" in p.out.read_text()
    assert not project.wait_idle()

def test_serve_refuses(project):
    "Another address, a changed file, a model that is not released."
    one_line(project.mlkit("serve", "--host", "0.0.0.0", rc=1), "0.0.0.0")
    one_line(project.mlkit("serve", "--workers", "1", rc=1), "takes 2 or more")
    one_line(project.run("env", "MLKIT_SERVING=/nowhere", "mlkit", "serve", "--engine", "triton", rc=1), "the engine triton: ", "mlkit setup")
    model = project / "models/bundle/onnx/model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    one_line(project.mlkit("serve", rc=1), "SHA-256", "model.onnx")
    one_line(project.mlkit("serve", "--alias", "nobody", rc=1), "nobody")

def test_doctor(project):
    done = project.mlkit("doctor")
    assert "has what 'mlkit repro' needs" in done.stdout and "Training" in done.stdout and not done.stderr
    hidden = project.run("env", "MLKIT_SERVING=/nowhere", "mlkit", "doctor", rc=4) # no serving environment
    assert "mlkit setup" in hidden.stdout

@pytest.mark.parametrize("command", ["params", "history", "doctor"])
def test_output_that_nobody_reads(project, command):
    "As by `| head -1`: the reader has gone, and there is nothing to say."
    assert not project.run("bash", "-c", f"mlkit {command} | true").stderr

def test_why(project):
    assert "train is up to date" in project.mlkit("why", "train").stdout
    project.param(train__optimizer__lr=0.004)
    assert project.mlkit("why", "train").stdout.strip() == "train.optimizer.lr: was 0.005, is 0.004"
    one_line(project.mlkit("why", "trian", rc=1), "did you mean 'train'")

def test_verify(project):
    "One flipped bit in any file, in a mode that DVC trusts; outputs and files of the cache, each found, named, and put right."
    import random
    r, faults, n = random.Random(0), 0, 10 if FULL else 2
    places = [project / f for f in project.outputs()], sorted(f for f in (project / ".dvc/cache/files").rglob("*") if f.is_file())
    for f in [f for files in places for f in r.sample([f for f in files if f.stat().st_size], n)]:
        good, mode = f.read_bytes(), f.stat().st_mode
        i = r.randrange(len(good))
        f.chmod(0o644); f.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1:]); f.chmod(r.choice([0o444, 0o644]))
        done = project.mlkit("verify", rc=4)
        faults += str(f.relative_to(project.root)) in done.stderr and " of " in done.stderr
        f.chmod(0o644); f.write_bytes(good); f.chmod(mode)
    assert faults == 2 * n
    assert project.mlkit("verify").stdout.startswith("All ")
    before = project.outputs()
    (project / "models/model.safetensors").write_bytes(b"x")
    done = project.mlkit("verify", "--repair")
    assert "To run again: train" in done.stdout and project.outputs() == before

def test_terminal_shows_lines_only(project):
    "On a terminal too: what runs, and no progress bar for every file."
    import os, pty, subprocess
    project.param(audit__max_imbalance=9.0)
    ours, theirs = pty.openpty()
    p = subprocess.Popen(["mlkit", "repro", "audit"], cwd=project.root, env=project.env | {"TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""
    while True:
        try: seen += (piece := os.read(ours, 65536))
        except OSError: break # the other end is closed
        if not piece: break
    os.close(ours)
    text = seen.decode()
    assert p.wait(300) == 0 and "✓ audit" in text and "audit 0 s" in text # the live line
    assert "Collecting" not in text and "Checking" not in text and len(text) < 5000, text[:2000]

def test_reproduce(uninterrupted, tmp_path):
    "A registered version is made again from its own commit and values, whatever the project holds by now; what differs is named."
    project = uninterrupted.clone(tmp_path / "project")
    project.param(train__n_epochs=1)
    (info := project / "captum-0.0.1.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: captum\nVersion: 0.0.1\n")
    done = project.mlkit("reproduce", "1", "--into", tmp_path / "again")
    assert "The same: all " in done.stdout and "byte for byte" in done.stdout
    assert [l.split(",")[-1] for l in done.stdout.splitlines() if l.startswith("differs: ")] == [" is 0.0.1"]
    assert sha256(tmp_path / "again/models/model.safetensors") == sha256(project / "models/model.safetensors")
    one_line(project.mlkit("reproduce", "1", "--into", tmp_path / "again", rc=1), "exists already")
    one_line(project.mlkit("reproduce", "7", rc=1), "no '7' of model 'digits'")
