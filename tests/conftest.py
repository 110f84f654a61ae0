"Finished runs of the pipeline, made once however many processes test; each test gets a clone that it may break."
import hashlib, json, os, re, shutil, subprocess, sys, time
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import unified_diff
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import cv2, numpy as np, psutil
import pytest
from filelock import FileLock
from ruamel.yaml import YAML

ROOT, BIN = Path(__file__).resolve().parents[1], Path(sys.executable).parent
FULL = os.environ.get("MLKIT_TEST_FULL") == "1" # `make test-full`: every case and every seed

COLD = {"XDG_RUNTIME_DIR": "/dev/null"} # no folder for the socket of a warm parent: kernels start as ordinary ones

def few(cases, n=1):
    "All cases in a full run, else the first `n`: for cases of one kind, which go through the same lines."
    return list(cases) if FULL else list(cases)[:n]

def sha256(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()

@cache
def may_differ() -> dict[str, str]: # Pattern of paths: 'always', 'sometimes', 'on a GPU'
    "Which outputs may differ between two runs of the same here: the table in README.md."
    from mlkit.device import find_gpus
    rows = [[x.strip() for x in l.split("|")[1:-1]] for l in (ROOT / "README.md").read_text().split("| may differ |")[1].split("\n\n")[0].splitlines()[2:]]
    return {p: when for what, when, _ in rows if when != "on a GPU" or find_gpus()[0] for p in re.findall("`(.+?)`", what)}

def differs_by_right(path): return any(fnmatch(path, p) for p in may_differ())

@dataclass
class Project:
    "A copy of the checkout, with its own git, its own DVC cache and its own `mlkit`."
    root: Path
    said: dict = field(default_factory=dict, repr=False) # What its runs printed
    seconds: float = 0.0 # That they took

    def __truediv__(self, path): return self.root / path

    @property
    def env(self):
        own = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_", "JPY_", "MLKIT_OUTPUTS", "PYTEST"))}
        return own | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(self.root), "COLUMNS": "200"}

    def run(self, *command, timeout=900, rc=0): # every bound is there against a hang only: a busy machine may be many times slower
        "Raises `AssertionError` with both outputs where the exit code is not `rc` (None: any)."
        done = subprocess.run(list(map(str, command)), cwd=self.root, env=self.env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
        assert rc is None or done.returncode == rc, f"{command} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def mlkit(self, *args, **kw): return self.run("mlkit", *args, **kw)
    def dvc(self, *args, **kw): return self.run("dvc", *args, **kw)
    def git(self, *args, **kw): return self.run("git", "-c", "user.name=t", "-c", "user.email=t@example.com", *args, **kw)
    def commit(self): self.git("add", "-A"); self.git("commit", "-qm", "state", "--allow-empty")
    def json(self, path): return json.loads((self / path).read_text())

    def param(self, **values): # param(train__lr=0.1)
        "Change params.yaml."
        yaml, path = YAML(), self / "params.yaml"
        params = yaml.load(path)
        for name, value in values.items():
            *outer, last = name.split("__")
            section = params
            for k in outer: section = section.setdefault(k, {})
            section[last] = value
        yaml.dump(params, path)

    def replace(self, path, old, new):
        "Change a text file in one place."
        text = (self / path).read_text()
        assert text.count(old) == 1, f"{path}: {old!r} occurs {text.count(old)} times"
        (self / path).write_text(text.replace(old, new))

    @property
    def stages(self): return YAML(typ="safe").load(self / "dvc.yaml")["stages"]

    def outputs(self, *names): # of all stages, or of these
        "path: SHA-256 of every file that the stages declare and that is there."
        stages = [s for n, s in self.stages.items() if not names or n in names] # the index is a view and declares none
        declared = [p for s in stages for p in [*s.get("outs", []), *(p for m in s.get("metrics", []) for p in m)]]
        files = [f for p in declared for f in ([self / p] if (self / p).is_file() else sorted((self / p).rglob("*")))]
        return {f.relative_to(self.root).as_posix(): sha256(f) for f in files if f.is_file()}

    @property
    def same(self):
        "What two runs of the same must have in common: outputs, and what `dvc.lock` says of each stage. Not what README.md excepts."
        outputs = self.outputs()
        excepted = [f for f in outputs if differs_by_right(f)]
        def known(entry): return entry["path"] if any(f"{f}/".startswith(f"{entry['path']}/") for f in excepted) else entry
        lock = {f"dvc.lock: {s}": e | {k: [known(x) for x in e[k]] for k in ("deps", "outs") if k in e} for s, e in YAML(typ="safe").load(self / "dvc.lock")["stages"].items()}
        return {f: h for f, h in outputs.items() if f not in excepted} | lock

    def apart(self, other):
        "What `same` says of the two that differs; of a text the lines too, so that a failure says why."
        mine, others = self.same, other.same
        def lines(project, path): return (project / path).read_text(errors="replace").splitlines() if (project / path).is_file() else []
        return {path: [l[:200] for l in unified_diff(lines(other, path), lines(self, path), lineterm="", n=0)][:20] or [str(others.get(path))[-300:], str(mine.get(path))[-300:]]
                for path in sorted({*mine, *others}) if mine.get(path) != others.get(path)}

    def strays(self):
        "Files that a stage which was stopped should not have left: those aside, and the temporary ones."
        found = [f for d in ("data", "models", "serving", "reports", ".mlkit/aside") if (self / d).exists() for f in (self / d).rglob("*")]
        measured = [f"reports/measurements/{name}" for name in ("export.json", "serve.json", "train.json", "verdict.json")]
        pages = [f"reports/measurements/{stage}.{ext}" for stage in ("export", "serve", "train") for ext in ("html", "ipynb")]
        kept = {*self.outputs(), "reports/index.html", "reports/registry.html", "reports/verdict.json", *measured, *pages}
        return sorted(f.relative_to(self.root).as_posix() for f in found if f.is_file() and f.relative_to(self.root).as_posix() not in kept)

    def processes(self):
        "Every process that works for this project: each has its PYTHONPATH, or its folder. The parent of warm kernels serves all projects."
        found = []
        for p in psutil.process_iter():
            try:
                here = Path(p.cwd()).is_relative_to(self.root)
                if p.status() != psutil.STATUS_ZOMBIE and (here or p.environ().get("PYTHONPATH") == str(self.root) and "mlkit.flow.warm" not in " ".join(p.cmdline())): found.append(p)
            except psutil.Error: pass
        return found

    def runs(self, program):
        "Whether a process of this name works for this project. One may end between two looks."
        def name(p):
            try: return p.name()
            except psutil.NoSuchProcess: return ""
        return any(program in name(p) for p in self.processes())

    def wait_idle(self, timeout=60):
        "The processes that are still there after `timeout` seconds."
        psutil.wait_procs(self.processes(), timeout=timeout)
        return self.processes()

    @contextmanager
    def started(self, *command, group=True):
        "A command of its own session, as a terminal gives it; whatever it has left is ended."
        out = self.root.parent / f"{self.root.name}.stdout"
        with open(out, "w") as o, open(out.with_suffix(".stderr"), "w") as e:
            p = psutil.Popen(list(map(str, command)), cwd=self.root, env=self.env | {"PYTHONUNBUFFERED": "1"}, stdout=o, stderr=e, stdin=subprocess.DEVNULL, start_new_session=group)
        p.out, p.err = out, out.with_suffix(".stderr")
        try: yield p
        finally:
            for q in {p, *self.processes()}:
                try: q.kill()
                except psutil.NoSuchProcess: pass
            p.wait(60)

    def clone(self, root):
        "A second one in the same state, as cheap as the file system allows."
        subprocess.run(["cp", "-a", "--reflink=auto", self.root, root], check=True, timeout=300)
        shutil.rmtree(root / ".dvc/tmp", ignore_errors=True)
        return type(self)(root, self.said, self.seconds)

class Moments:
    """All that `kill -9` may leave of a call: a copy of the folder before each change of a file in it, and with half of what was written.
    The disk is all that outlives a process, so no process has to die for it: `with Moments(root, into) as moments: call()`."""
    hooked, now = False, None # Python keeps an audit hook for good

    def __init__(self, root, into, but=()): # But: folders of copies that are fetched again
        self.root, self.into, self.but, self.began, self.written = root, into, but, time.time(), [] # Written: files that were opened since the last moment
        self.seen = {} # Copy: what was about to happen

    def __enter__(self):
        if not Moments.hooked: sys.addaudithook(lambda event, args: Moments.now and event in ("open", "os.rename", "os.remove") and Moments.now.note(event, args))
        Moments.hooked, Moments.now = True, self
        return self

    def __exit__(self, *_):
        Moments.now = None
        self.copies("the end")

    def note(self, event, args):
        path, writes = Path(os.fsdecode(args[0])) if not isinstance(args[0], int) else None, event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes or path is None or self.root not in path.parents or path.suffix == ".lock" or event != "open" and not path.exists(): return
        if any(self.root / folder in path.parents for folder in self.but): return
        Moments.now = None # what is done here is no change
        try: self.copies(f"{event} {path.relative_to(self.root)}")
        finally: Moments.now = self
        if event == "open": self.written.append(path.relative_to(self.root))

    def copies(self, what):
        for half in [p for p in self.written if (self.root / p).is_file()]: self.copy(f"half of {half}", half)
        self.written.clear()
        self.copy(what)

    def copy(self, what, half=None): # Half: a file in the folder
        to = self.into / str(len(self.seen))
        for folder, _, files in os.walk(self.root):
            there = to / Path(folder).relative_to(self.root)
            there.mkdir()
            for path, new in [(Path(folder) / f, there / f) for f in files]:
                if ".db" not in path.name and (path.is_symlink() or path.stat().st_mtime < self.began - 1): os.link(path, new, follow_symlinks=False)
                else: # it may be written in place
                    data = path.read_bytes()
                    new.write_bytes(data[:len(data) // 2] if half and new == to / half else data)
        self.seen[to] = what

EVIL = '<img src=x onerror="document.title=1337">' # a label, as somebody's folder could be called

def ran(text): return [l[2:].strip() for l in text.splitlines() if l.startswith("▸ ") and l != "▸ index"]

def one_line(done, *words):
    "The failure of `done` in one line, which holds `words`; no traceback."
    text = done.stdout + done.stderr
    assert done.returncode not in (0, None) and "Traceback" not in text, text[-3000:]
    lines = [l for l in done.stderr.splitlines() if l.strip()]
    assert len(lines) == 1, f"{len(lines)} lines on stderr:\n" + done.stderr[-3000:]
    assert lines[0].startswith("mlkit: ") and all(w in lines[0] for w in words), f"{words} are not all in: {lines[0]}"
    return lines[0]

def wait_for(condition, what, timeout=300):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if value := condition(): return value
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {timeout} s")

def checkout(root):
    "The checkout as git would carry it, nothing run."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    for name in ("champion.json", "history.jsonl", "looks.jsonl"): (root / name).unlink(missing_ok=True) # nobody to beat
    for module in (root / "mlkit").rglob("*.py"): os.utime(module) # they are in step; a checkout says the order in which git wrote them
    project = Project(root)
    project.replace("params.yaml", "serve.p99_ms: {max: 50}", "serve.p99_ms: {max: 5000}") # no test hangs on the speed of a machine
    project.git("init", "-q")
    project.commit()
    return project

@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    "`shared(name, make)`: a clone of the project that `make(folder)` gives. Of all processes that ask, one makes it; the others wait."
    top = Path(os.environ.get("TESTS_SHARE") or tmp_path_factory.mktemp("shared"))
    def get(name, make, kind=Project):
        done = top / f"{name}.json"
        with FileLock(top / f"{name}.lock", timeout=1500):
            if not done.is_file():
                shutil.rmtree(top / name, ignore_errors=True)
                (top / name).mkdir()
                start = time.monotonic()
                project = make(top / name)
                done.write_text(json.dumps({"root": project.root.name, "said": project.said, "seconds": time.monotonic() - start}))
        kept = json.loads(done.read_text())
        folder = tmp_path_factory.mktemp(name)
        subprocess.run(["cp", "-a", "--reflink=auto", f"{top / name}/.", folder], check=True, timeout=300) # with the data beside it
        shutil.rmtree(folder / kept["root"] / ".dvc/tmp", ignore_errors=True)
        return kind(folder / kept["root"], kept["said"], kept["seconds"])
    return get

@pytest.fixture(scope="session")
def fresh(tmp_path_factory): return checkout(tmp_path_factory.mktemp("fresh") / "project")

def quick(project):
    "The same stages with less to do in each; in a full run with all that the stages compare and show."
    project.param(train__n_epochs=3, serve__measure_s=0.3, serve__concurrency=[1], evaluate__n_bins=5, stress__retrain_gflop=2)
    if not FULL:
        project.param(audit__max_samples=500, export__variants=["fp32"], explain__n_ordinary=2, explain__n_wrong=2, explain__method={"n_steps": 8},
                      stress__n_samples=100, stress__n_learned=300)
    project.replace("params.yaml", "evaluate.accuracy: {min: 0.97}", "evaluate.accuracy: {min: 0.5}")
    return project

def brief(project):
    "A made project that learns and measures for a moment, and builds nothing for machines that are not here, or that is not served."
    project.param(train__n_epochs=8, export__engine="none", export__variants=["fp32"], serve__measure_s=0.3, serve__concurrency=[1], stress__retrain_gflop=0,
                  explain__n_ordinary=2, explain__n_wrong=2)
    return project

@pytest.fixture(scope="session")
def uninterrupted(fresh, shared):
    "The quick pipeline after `mlkit repro`. For reading only."
    def make(folder):
        project = quick(fresh.clone(folder / "project"))
        project.commit()
        project.mlkit("repro")
        return project
    return shared("uninterrupted", make)

@pytest.fixture(scope="session")
def finished(fresh, shared):
    "After `mlkit repro`. For reading only: take `project` to change something."
    def make(folder):
        project = fresh.clone(folder / "project")
        done = project.mlkit("repro", rc=None)
        assert done.returncode == 0, f"'mlkit repro' of the checkout ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        project.said["repro"] = done.stdout
        project.commit()
        return project
    return shared("finished", make)

@pytest.fixture
def project(finished, tmp_path):
    "A clone of the finished project; all that it started is ended after the test."
    clone = finished.clone(tmp_path / "project")
    yield clone
    for p in clone.processes(): p.kill()
    shutil.rmtree(clone.root, ignore_errors=True)

@pytest.fixture(scope="session")
def pictures(finished, tmp_path_factory):
    "A project whose data are a folder: three classes of RGB images of many sizes, one of them no image. Nothing run yet."
    project = finished.clone(tmp_path_factory.mktemp("pictures") / "project")
    random = np.random.default_rng(0)
    for c, label in enumerate(("cat", "dog & co", EVIL)):
        (folder := project / "raw" / label).mkdir(parents=True)
        for i in range(40):
            x = np.full((*random.integers(20, 60, 2), 3), 30, np.uint8); x[..., c] = 200 # blue, green, red, as OpenCV counts
            x = np.clip(x + random.normal(0, 20, x.shape), 0, 255).astype(np.uint8)
            assert cv2.imwrite(str(folder / f"{i:03d}.{('png', 'jpg')[i % 2]}"), x)
    (project / "raw/cat/torn.png").write_bytes((project / "raw/cat/000.png").read_bytes()[:100])
    project.param(ingest__source="raw", prepare__input={"image_size": 16})
    return project
