"What goes wrong at a user's: one line that says what, where and what to do; nothing half-written; the next run goes on."
import json, os, shutil, signal, socket, subprocess, sys

import cv2, numpy as np, polars as pl
import pytest
from conftest import EVIL, Project, few, one_line, ran, wait_for

@pytest.fixture(scope="module")
def broken(finished, tmp_path_factory):
    "A clone whose parameters tests break and put back."
    return finished.clone(tmp_path_factory.mktemp("broken") / "project")

def nothing_half_written(project, before, *stages):
    "What is declared is as it was, or away (DVC clears a stage's outputs before it runs, and restores them from its cache); nothing else is left."
    now = project.outputs(*stages)
    assert {p: h for p, h in now.items() if before.get(p) != h} == {} and project.strays() == [] and project.processes() == []

@pytest.fixture
def untouched(broken):
    "After the test nothing may be half-written, and what it changed is put back."
    before = broken.outputs()
    yield broken
    nothing_half_written(broken, before)
    broken.git("checkout", ".")
    if broken.outputs() != before: broken.dvc("checkout", "-f")
    assert broken.outputs() == before

# params.yaml

BAD_PARAMS = {
    "typo": ("  batch_size: 64", "  batch_sise: 64", ["params.yaml", "train", "batch_sise", "did you mean 'batch_size'"]),
    "unknown network": ("name: small_cnn", "name: smal_cnn", ["params.yaml", "train.model", "smal_cnn", "did you mean 'small_cnn'"]),
    "unknown parameter of a network": ("width: 24", "widht: 24", ["params.yaml", "train.model", "widht", "did you mean 'width'"]),
    "mistyped": ("  n_epochs: 30", "  n_epochs: many", ["params.yaml", "train.n_epochs", "integer", "'many'"]),
    "float for int": ("  n_epochs: 30", "  n_epochs: 30.5", ["params.yaml", "train.n_epochs", "30.5"]),
    "text for number": ("lr: 0.005", "lr: '0.005'", ["params.yaml", "train.optimizer.lr", "'0.005'"]),
    "out of range": ("  n_epochs: 30", "  n_epochs: 0", ["params.yaml", "train.n_epochs", "greater than 0"]),
    "not a choice": ("  engine: auto ", "  engine: rocket ", ["params.yaml", "export.engine", "tensorrt", "rocket"]),
    "unknown section": ("train:\n  model", "trian:\n  model", ["params.yaml", "no stage is called 'trian'", "did you mean 'train'"]),
    "no values": ("explain:\n  n_ordinary: 6", "explain: 6\nx:\n  n_ordinary: 6", ["params.yaml"]),
    "no YAML": ("lr: 0.005", "lr: [0.005", ["params.yaml, line", "not valid YAML"]),
    "a tab": ("  n_bins: 10", "\tn_bins: 10", ["params.yaml, line", "not valid YAML"]),
    "twice": ("  n_epochs: 30", "  n_epochs: 30\n  n_epochs: 3", ["params.yaml, line", "n_epochs"]),
    "no bound": ("    evaluate.accuracy: {min: 0.97}", "    evaluate.accuracy: {mni: 0.97}", ["params.yaml", "release.criteria.evaluate.accuracy", "mni"]),
    "a bound that none meets": ("    evaluate.accuracy: {min: 0.97}", "    evaluate.accuracy: {min: .nan}", ["release.criteria", "finite number"]),
    "bounds that exclude each other": ("    evaluate.accuracy: {min: 0.97}", "    evaluate.accuracy: {min: 0.97, max: 0.5}", ["no figure meets"]),
    "unknown check": ("block: [unreadable, conflict]", "block: [conflicts]", ["params.yaml", "audit.block", "conflicts", "did you mean 'conflict'"]),
    "unknown score": ("  n_bins: 10", "  n_bins: 10\n  metric: accurac", ["params.yaml", "evaluate.metric", "did you mean 'accuracy'"]),
    "unknown class": ("train:\n  model", "train:\n  decide: {costs: {'11': 2}}\n  model", ["params.yaml", "train.decide", "no class is called '11'"]),
    "instructions": ("train:\n  model", "pipeline: {instruction_set: sse}\ntrain:\n  model", ["params.yaml", "pipeline.instruction_set", "avx2"]),
}

@pytest.mark.parametrize("case", BAD_PARAMS)
def test_bad_params(untouched, case):
    old, new, words = BAD_PARAMS[case]
    untouched.replace("params.yaml", old, new)
    before = untouched.outputs()
    one_line(untouched.mlkit("repro", rc=1), *words)
    if case == "typo": one_line(untouched.mlkit("run", "train", rc=1), *words)
    assert untouched.outputs() == before # not even cleared: it is seen before anything runs

def test_bad_words_and_places(untouched, tmp_path):
    one_line(untouched.mlkit("run", "trian", rc=1), "trian", "did you mean 'train'")
    one_line(untouched.mlkit("repro", "trian", rc=None), "trian")
    assert "No such command 'rnu'" in (done := untouched.mlkit("rnu", rc=2)).stderr and "Traceback" not in done.stderr
    elsewhere = Project(tmp_path)
    for command in ("repro", "release", "index", "render"): one_line(elsewhere.mlkit(command, rc=1), "no params.yaml", "go to")

def test_dvc_too_fails_without_traceback(untouched):
    untouched.param(ingest__source="nowhere")
    done = untouched.dvc("repro", "ingest", rc=None)
    assert done.returncode != 0 and "Traceback" not in done.stderr and "mlkit: ingest: " in done.stderr

# Data

@pytest.mark.parametrize("source, words", [("data/raw", ["ingest", "data/raw", "folder"]), ("digit", ["did you mean 'digits'"])])
def test_missing_data(untouched, source, words):
    untouched.param(ingest__source=source)
    one_line(untouched.mlkit("repro", rc=1), *words)

def test_data_that_break_the_contract(untouched):
    contract = untouched.json("data/contract.json")
    contract["target"]["categories"].remove("7")
    contract["inputs"][0]["shape"] = [8, 9, 1]
    (untouched / "mine.json").write_text(json.dumps(contract))
    untouched.param(ingest__contract="mine.json")
    line = one_line(untouched.mlkit("repro", rc=1), "ingest", "contract", "'7' is not in the contract's categories", "width 8 where the contract has 9", "digits/0007")
    assert "mend the data" in line
    (untouched / "mine.json").write_text(json.dumps(contract | {"min_sample": 3}))
    one_line(untouched.mlkit("repro", rc=1), "mine.json", "min_sample")
    (untouched / "mine.json").write_text("{")
    one_line(untouched.mlkit("repro", rc=1), "mine.json", "JSON")
    (untouched / "mine.json").unlink()
    one_line(untouched.mlkit("repro", rc=1), "mine.json", "no such file")
    untouched.git("checkout", "params.yaml")
    assert ran(untouched.mlkit("repro").stdout) == [] # put right: what was there is restored, not run

def test_unreadable_image_blocks_by_name(pictures):
    before = pictures.outputs("audit", "prepare", "train")
    done = pictures.mlkit("repro", rc=1)
    assert ran(done.stdout) == ["ingest", "audit"]
    one_line(done, "audit", "cat/torn.png", "1 of 121 images cannot be decoded", "audit.block")
    assert pictures.outputs("audit", "prepare", "train") == before
    failed = (pictures / ".mlkit/failed/audit.html").read_text() # where it stopped can be seen
    assert "cannot be decoded" in failed and "Balance" in failed
    assert ran(pictures.mlkit("repro", "audit", rc=1).stdout) == ["audit"] # what was finished is kept

def test_what_is_left_out_is_counted_on_the_page(fresh, tmp_path):
    "By reason, with names; the rest is brought in. A class that loses all its images stops the run in one line."
    project, random = fresh.clone(tmp_path / "project"), np.random.default_rng(0)
    for label in ("cat", "dog"):
        (project / "raw" / label).mkdir(parents=True)
        for i, ending in enumerate([".png"] * 6 + [".jpg", ".gif"]):
            image = random.integers(0, 255, (20, 20, 3)).astype(np.uint8)
            (project / f"raw/{label}/{i}{ending}").write_bytes(cv2.imencode(ending, image)[1].tobytes())
    deep = random.integers(0, 65535, (20, 20, 3)).astype(np.uint16)
    (project / "raw/cat/deep.png").write_bytes(cv2.imencode(".png", deep)[1].tobytes())
    for i in range(3): (project / f"raw/dog/{i}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    latin = project / "raw/cat" / os.fsdecode("café.png".encode("latin-1")) # a name that DVC cannot write down
    latin.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    project.param(ingest__source="raw")
    assert ran(project.mlkit("repro", "ingest").stdout) == ["ingest"]
    assert project.json("reports/metrics/ingest.json")["samples"] == 18
    page = (project / "reports/ingest.html").read_text()
    for line in ("left out: 3 images: HEIC, which OpenCV does not decode; save it as PNG or JPEG (dog/0.heic, dog/1.heic, dog/2.heic)",
                 "changed: 1 image: 16 bits a channel, scaled to 8 (cat/deep.png)", "changed: 2 images: GIF"): assert line in page, line
    for f in (project / "raw/dog").glob("?.[pgj]*"): f.unlink()
    line = one_line(project.mlkit("repro", "ingest", rc=1), "raw: class 'dog' has lost all its samples (3)", "3 images: HEIC", "dog/0.heic")
    assert "save it as PNG or JPEG" in line

def splits_of(project):
    "The split of each image, by its content."
    return {c: s for s in ("train", "validation", "test") for c in pl.read_parquet(project / f"data/prepared/{s}.parquet")["content"]}

BROKEN = """
import sys
import cv2, numpy as np
from mlkit.data.shards import decode
whole = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), (9, 9), 0)
for ext in ("png", "jpg", "webp", "tiff", "bmp", "jp2", "gif", "ppm"):
    data = cv2.imencode(f".{ext}", whole)[1].tobytes()
    seen = [decode(broken) is None for broken in (data[:20], data[:len(data) // 2])]
    print(ext, seen[0])
"""

def test_opencv_writes_nothing_about_broken_images():
    "mlkit counts them and names them; OpenCV's own lines are there for whoever asks for them."
    def said(**env):
        own = {k: v for k, v in os.environ.items() if k != "OPENCV_LOG_LEVEL"}
        return subprocess.run([sys.executable, "-c", BROKEN], env=own | env, capture_output=True, text=True, check=True)
    done = said()
    assert done.stderr == "" and all(line.split()[1] == "True" for line in done.stdout.splitlines()) and done.stdout.count("\n") == 8
    assert "buffer is incomplete" in said(OPENCV_LOG_LEVEL="WARNING").stderr

def test_folder_of_images(pictures):
    assert pictures.json("reports/metrics/ingest.json").items() >= {"samples": 121, "classes": 3}.items()
    pictures.param(audit__block=["conflict"])
    assert ran(pictures.mlkit("repro", "prepare").stdout) == ["audit", "prepare"]
    from safetensors.numpy import load_file
    task = pictures.json("data/prepared/task.json")
    classes = task["target"]["classes"]
    assert task["input"]["shape"] == [16, 16, 3] and classes == sorted(["cat", "dog & co", EVIL])
    n = 0
    for split in ("train", "validation", "test"):
        (X, y), = [tuple(load_file(pictures / f"data/prepared/{split}.safetensors")[k] for k in ks) for ks in (("X", "y"),)]
        n += len(X)
        assert X.shape[1:] == (16, 16, 3) and X.dtype == np.uint8
        for c, label in enumerate(("cat", "dog & co", EVIL)): # blue, green, red: channel 2, 1, 0 in RGB
            assert (X[y == classes.index(label)].mean((0, 1, 2)).argmax() == 2 - c)
    assert n == 120 and pictures.json("reports/metrics/prepare.json")["left_out"] == 1
    assert len(splits_of(pictures)) == 120

def test_one_more_image_changes_no_split(pictures):
    before = splits_of(pictures)
    cv2.imwrite(str(pictures / "raw/cat/aaa.png"), np.random.default_rng(9).integers(0, 255, (30, 30, 3), np.uint8))
    assert ran(pictures.mlkit("repro", "prepare").stdout) == ["ingest", "audit", "prepare"]
    after = splits_of(pictures)
    assert len(after) == len(before) + 1 and all(after[c] == s for c, s in before.items())

# The machine

def test_port_in_use(project):
    before = project.outputs()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        port = s.getsockname()[1]
        project.param(serve__port=port)
        one_line(project.mlkit("repro", "serve", rc=1), "serve", f"port {port} is in use", str(os.getpid()), "choose another")
    nothing_half_written(project, before)
    assert ran(project.mlkit("repro", "serve").stdout) == ["serve"] # free again

@pytest.fixture(scope="module")
def small_disk(finished, tmp_path_factory):
    "A clone on a file system of its own, which a test can fill."
    disk = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "none", str(disk)], capture_output=True, text=True) if shutil.which("mount") else None
    if not mounted or mounted.returncode: pytest.skip("not run: a full disk; no tmpfs can be mounted here (needs root)")
    project = finished.clone(disk / "project")
    project.param(audit__max_samples=500)
    try: yield project
    finally: subprocess.run(["umount", "-l", str(disk)], check=True)

@pytest.mark.parametrize("left_kb", few([200, 1500, 0], 2))
def test_full_disk(small_disk, left_kb):
    "Full from the start, while the stage writes, and while DVC takes what it wrote: its outputs need about 2 MB."
    project, ballast = small_disk, small_disk.root.parent / "ballast"
    project.param(ingest__samples_per_file=500 + left_kb)
    before = project.outputs()
    with open(ballast, "wb") as f: os.posix_fallocate(f.fileno(), 0, shutil.disk_usage(project.root).free - left_kb * 1024)
    try: done = project.mlkit("repro", "prepare", rc=None)
    finally: ballast.unlink()
    try:
        one_line(done, "no space left on the disk", "free some")
        whole = [l.split()[1] for l in done.stdout.splitlines() if l.startswith("✓ ")] # a stage that was finished may have left its outputs
        made = set(project.outputs(*whole)) if whole else set()
        nothing_half_written(project, {p: h for p, h in project.outputs().items() if p in made} | {p: h for p, h in before.items() if p not in made})
    finally: again = project.mlkit("repro", "prepare") # now that there is room
    assert "prepare" in ran(again.stdout) + ran(done.stdout) and project.strays() == [] and len(project.outputs("ingest", "audit", "prepare")) > 15
    assert "up to date" in project.dvc("status", "prepare").stdout

# Ctrl-C, and being killed

@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory):
    "A clone with much to run, whose runs are stopped one after the other."
    project = finished.clone(tmp_path_factory.mktemp("stopped") / "project")
    project.param(ingest__samples_per_file=600, audit__max_samples=500, train__seed=1, train__n_epochs=8, export__variants=["fp32"], stress__retrain_gflop=0)
    return project

def stop(project, stage, wait, send, group=True):
    "Run until `stage` has begun and `wait()` holds, then `send(process)`. Returns the exit code, both outputs."
    with project.started("mlkit", "repro") as p:
        wait_for(lambda: p.poll() is not None or f"▸ {stage}\n" in p.out.read_text(), f"{stage} begins")
        assert p.poll() is None, p.err.read_text()[-2000:]
        wait_for(lambda: p.poll() is not None or wait(project, p), f"{stage} is under way")
        assert f"✓ {stage}" not in p.out.read_text(), f"{stage} was over before it could be stopped"
        send(p)
        rc = p.wait(300)
        left = project.wait_idle()
        assert left == [], [q.cmdline() for q in left if q.is_running()]
        return subprocess.CompletedProcess("mlkit repro", rc, p.out.read_text(), p.err.read_text())

def to_group(signum): return lambda p: os.killpg(p.pid, signum)
def begun(project, p): return (project / ".mlkit/aside/ingest").exists()
def training(project, p): return "epoch   " in p.out.read_text()
def serving(project, p): return any("tritonserver" in q.name() for q in project.processes())

@pytest.mark.parametrize("stage, when, signum", [
    ("ingest", begun, signal.SIGINT),
    ("train", training, signal.SIGINT),
    ("serve", serving, signal.SIGTERM),
], ids=["ingest-INT", "train-INT", "serve-TERM"])
def test_interrupted(stopped, stage, when, signum):
    before = stopped.outputs()
    done = stop(stopped, stage, when, to_group(signum))
    assert done.returncode in ([130] if signum == signal.SIGINT else {*range(-64, 256)} - {0}), done.stdout[-500:] + done.stderr[-2000:]
    assert done.returncode < 0 or one_line(done, "interrupted", "the next run goes on")
    assert "Traceback" not in done.stderr + done.stdout
    nothing_half_written(stopped, before, stage)
    if stage == "serve": assert ran(done.stdout)[-1] == "serve" and "train" not in ran(done.stdout)[1:]

@pytest.mark.parametrize("signum", few([signal.SIGKILL, signal.SIGTERM]), ids=lambda s: s.name)
def test_parent_alone_is_killed(stopped, signum):
    "As the machine's out-of-memory killer or a job scheduler does it: the stage must notice, and leave nothing half-written."
    before = stopped.outputs()
    stop(stopped, "serve", serving, lambda p: p.send_signal(signum))
    shutil.rmtree(stopped / ".mlkit/aside") if signum == signal.SIGKILL else None # what a killed run leaves there, the next one clears
    nothing_half_written(stopped, before, "serve")

def test_goes_on_from_the_last_finished_stage(stopped):
    done = stopped.mlkit("repro", "release")
    assert ran(done.stdout) == ["serve", "release"]
    assert "up to date" in stopped.dvc("status", "release").stdout and stopped.strays() == [] and stopped.processes() == []
    assert "nothing to run" in stopped.mlkit("repro", "release").stdout
