"Sources where they really are: a PostgreSQL server, an S3 server, an HTTP server, what Hugging Face's library saves, a package with an entry point."
import functools, gzip, http.server, io, os, re, shutil, socket, subprocess, sys, tarfile, tempfile, threading
from contextlib import contextmanager
from pathlib import Path

import cv2, numpy as np, polars as pl
import pytest

from mlkit.core import MlkitError, SetupError
from mlkit.data.shards import decode, read_encoded, write_shards
from mlkit.sources.base import SOURCES
from mlkit.sources.locator import original
from mlkit.sources.paths import watched
from mlkit.sources.registry import detect, look, normalised, open_source

def encoded(ending, x=np.full((8, 8, 3), 200, np.uint8), *flags): return cv2.imencode(ending, x, flags)[1].tobytes()
def png(i): return cv2.imencode(".png", np.full((4, 4), i, np.uint8))[1].tobytes()
def rows(name, root=Path("/")): return pl.concat(open_source(name, root).rows())
def put(path, data): path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(data if isinstance(data, bytes) else data.encode()); return path

def says(f, *words, never=()):
    "The error that `f` raises: one line, with all of these words and none of those."
    with pytest.raises(MlkitError) as e: f()
    text = str(e.value)
    assert "\n" not in text and all(w in text for w in words) and not any(w in text for w in never), text
    return text

@contextmanager
def other_user():
    "As a user who may not read everything; root may."
    if os.geteuid() != 0: yield; return
    os.seteuid(65534)
    try: yield
    finally: os.seteuid(0)

# Files

@pytest.fixture
def folder():
    "One that another user may look into."
    with tempfile.TemporaryDirectory(prefix="mlkit-source-") as d: os.chmod(d, 0o755); yield Path(d)

def test_unreadable(folder):
    put(folder / "a.csv", "x,y\n1,2\n").chmod(0); put(folder / "pets/a/1.png", png(1)); put(folder / "pets/b/1.png", png(2)).chmod(0)
    put(folder / "shut/a.csv", "x\n1\n"); put(folder / "a.parquet", b"").chmod(0)
    (folder / "shut").chmod(0)
    try:
        with other_user():
            for name in ("a.csv", "a.parquet"): says(lambda: rows(name, folder), name, "no permission")
            says(lambda: open_source("shut", folder), "shut", "no permission")
            says(lambda: list(open_source("pets", folder).images()), "pets/b/1.png", "no permission")
    finally: (folder / "shut").chmod(0o755)

@pytest.mark.parametrize("name, data, words", [
    ("empty.csv", b"", ["empty.csv"]),
    ("empty.parquet", b"", ["empty.parquet", "cannot be read"]),
    ("no.parquet", b"PAR1" * 99, ["no.parquet", "cannot be read"]),
    ("cut.csv.gz", gzip.compress(os.urandom(9000).hex().encode())[:5000], ["cut.csv.gz"]),
    ("no.csv.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 99, ["no.csv.zst"]),
    ("bad.jsonl", b'{"a": 1}\n\n{"a": 2,}\n', ["bad.jsonl", "line 3"]),
    ("latin.jsonl", '{"a": "é"}\n'.encode("latin-1"), ["latin.jsonl", "line 1", "byte 0xe9 is not UTF-8", "iconv"]),
    ("latin.csv", "a\nx\né\n".encode("latin-1"), ["latin.csv", "line 3", "byte 0xe9 is not UTF-8", "iconv"]),
    ("list.jsonl", b'[1, 2]\n', ["list.jsonl", "line 1"]),
    ("utf16.jsonl", '{"a": 1}\n'.encode("utf-16"), ["utf16.jsonl", "line 1", "not one JSON object"]),
    ("nested.jsonl", b'{"a": [1]}\n', ["nested.jsonl", "'a' holds lists"]),
    ("no.tar", b"x" * 2000, ["no.tar", "cannot be read"]),
    ("empty.tar", b"", ["empty.tar", "cannot be read"]),
    ("cut.tgz", gzip.compress(os.urandom(9000))[:5000], ["cut.tgz", "cannot be read"]),
    ("no.sqlite", b"", ["no.sqlite", "no SQLite database"]),
    ("data.json", b"[]", ["data.json", "save it as .jsonl"]),
    ("model.pkl", b"", ["model.pkl", "unpickles nothing"]),
    ("data.foo", b"", ["data.foo", "'.foo'", "known: "]),
    ("data", b"", ["data", "ending ''"]),
])
def test_bad_files(tmp_path, name, data, words):
    put(tmp_path / name, data)
    def read():
        s = open_source(name, tmp_path)
        list(s.images() if s.modality == "image" else s.rows())
    says(read, *words)

def test_tar_is_what_webdataset_reads(tmp_path):
    "Our own shards are tar shards: what goes in comes out."
    digits = [s for s, _ in zip(open_source("digits", tmp_path).images(), range(50))]
    write_shards(digits, tmp_path / "shards", shard_size=20)
    back = list(open_source("shards/*.tar", tmp_path).images())
    assert [(s.data, s.ext, s.label) for s in back] == [(s.data, s.ext, s.label) for s in digits]
    assert detect("shards/*.tar", tmp_path)[:2] == ("image", "images in 3 tar files")

def test_hidden_pieces_and_brackets(tmp_path):
    "Names that mean something to glob, and what systems leave in folders."
    for f in ("a[1].csv", "b*.csv", ".c.csv", ".cache/d.csv"): put(tmp_path / "t" / f, "x\n1\n")
    put(tmp_path / "j/[1].jsonl", '{"x": 1}\n'); pl.DataFrame({"x": [1]}).write_parquet(put(tmp_path / "p/[1].parquet", b"")); put(tmp_path / "t/_SUCCESS", b""); put(tmp_path / "t/.DS_Store", b""); put(tmp_path / "t/Thumbs.db", b""); put(tmp_path / "old.data", "x\ty\n1\t2\n")
    assert [len(rows(n, tmp_path)) for n in ("t", "j", "p", "t/b*.csv")] == [2, 1, 1, 1]
    assert rows("old.data", tmp_path).columns == ["x", "y"]
    kind, what, reasons = detect("t", tmp_path)
    assert (kind, what) == ("rows", "CSV, 2 files") and any("1 other file" in r for r in reasons)

def test_larger_than_a_chunk(tmp_path):
    df = pl.DataFrame({"i": range(250_000), "s": [f"s{i}" for i in range(250_000)]})
    df.write_csv(tmp_path / "a.csv"); df.write_parquet(tmp_path / "a.parquet"); df.write_ndjson(tmp_path / "a.jsonl")
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        parts = list(open_source(name, tmp_path).rows(chunk_rows=100_000))
        assert len(parts) > 1 and max(map(len, parts)) <= 100_000 and pl.concat(parts).cast({"i": pl.Int64}).equals(df), name

# One bad file or row does not stop the rest, and is not lost without a word

LATIN = os.fsdecode("café".encode("latin-1"))
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
DEEP = np.linspace(0, 65535, 8 * 8 * 3).astype(np.uint16).reshape(8, 8, 3)

def pets(folder, files): # two classes of three images, and more
    "A folder of images."
    for i in range(3):
        for label in ("cat", "dog"): put(folder / "pets" / label / f"{i}.png", png(10 * i + len(label)))
    for name, data in files.items(): put(folder / "pets" / name, data)
    return folder / "pets"

def ingested(name, root):
    "As the stage `ingest` brings samples in: the source, the index, and the index as pages and JSON have it."
    source = open_source(name, root)
    index = write_shards(source.images(), root / "shards")
    index.write_ndjson(io.BytesIO()); str(source.reasons).encode()
    return source, index

@pytest.mark.parametrize("name", [f"cat/{LATIN}.png", f"{LATIN}/1.png", f"{LATIN}/{LATIN}.jpg", "cat/two\nlines.png", "cat/a\\b.png", f"cat/{LATIN}\\.png"])
def test_names_that_are_not_utf8(tmp_path, name):
    folder = pets(tmp_path, {name: png(99)})
    _, index = ingested("pets", tmp_path)
    row = index.row(by_predicate=~pl.col("name").str.contains(r"^(cat|dog)/\d\.png$"), named=True)
    assert len(index) == 7 and row["content"] and (folder / original(row["name"])).read_bytes() == png(99)
    assert original(row["label"]) == name.split("/")[0]
    assert watched("pets", tmp_path) == (None if LATIN in name else "pets")

def test_names_that_are_not_utf8_elsewhere(tmp_path):
    "In a tar, in a label file's folder, of a table, and of what is refused."
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in (f"{LATIN}/1.png", "b/1.png"): info = tarfile.TarInfo(name); info.size = len(png(1)); tar.addfile(info, io.BytesIO(png(1)))
    assert ingested("a.tar", tmp_path)[1]["label"].to_list() == [r"caf\xe9", "b"]
    put(tmp_path / "l" / f"{LATIN}.png", png(1)); put(tmp_path / "l/2.png", png(2)); put(tmp_path / "l/labels.csv", "file,label\ncaf\\xe9.png,a\n2.png,b\n")
    assert ingested("l", tmp_path)[1]["name"].to_list() == [r"caf\xe9.png", "2.png"]
    put(tmp_path / "t" / f"{LATIN}.csv", "x,y\n1,2\n")
    assert rows("t", tmp_path).rows() == [("1", "2")]
    for name, data in (("x.parquet", b""), ("y.png", png(1)), ("z.foo", b""), ("w.csv", b"x,y\n1,2\n1,2\n3\n")): says(lambda: rows(put(tmp_path / LATIN / name, data).as_posix(), tmp_path), r"caf\xe9")
    says(lambda: open_source(str(tmp_path / "none" / LATIN), tmp_path), r"caf\xe9", "neither a file nor a folder")

@pytest.mark.parametrize("links", [{"pets/cow": "far/cow"}, {"pets/cow/a": "far/cow"}, {"pets": "far/pets"}, {"pets": "far/one", "far/one": "far/pets"}, {"pets/train": "far/pets", "pets/test": "far/pets"}])
def test_linked_folders(tmp_path, links):
    "Of images that lie elsewhere none is missing, wherever the link is; DVC follows no such link, so mlkit looks."
    for c in ("cow", "pig"): put(tmp_path / "far/pets" / c / "1.png", png(ord(c[0]))); put(tmp_path / "far" / c / "2.png", png(ord(c[1])))
    for link, to in links.items():
        (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / to)
    if "pets/train" not in links and "pets" not in links: put(tmp_path / "pets/pig/3.png", png(3))
    labels = ingested("pets", tmp_path)[1]["label"]
    assert sorted(set(labels)) == ["cow", "pig"] and len(labels) == (4 if "pets/train" in links else 2)
    before = look("pets", tmp_path)
    assert (before is None) == ("pets" in links) == (watched("pets", tmp_path) == "pets") # a link at the top is followed
    if before: put((tmp_path / links[min(links)]) / "x/4.png", png(4)); assert look("pets", tmp_path) not in (None, before)

@pytest.mark.parametrize("to", [".", "..", "../..", "../dog/back", "itself"])
def test_links_in_a_circle(tmp_path, to):
    folder = pets(tmp_path, {})
    (folder / "cat/itself").symlink_to(to)
    (folder / "dog/back").symlink_to("../cat")
    source, index = ingested("pets", tmp_path)
    assert {"cat/0.png", "dog/0.png", "dog/back/0.png"} <= set(index["name"]) and len(index) < 40
    assert sum(t.n for t in source.left_out.values()) >= 1 and any("itself" in r for r in source.reasons)

@pytest.mark.parametrize("ending, data", [(".jfif", encoded(".jpg")), (".jpe", encoded(".jpg")), (".pjpeg", encoded(".jpg")), (".gif", encoded(".gif")), (".avif", encoded(".avif")), (".ppm", encoded(".ppm")),
    ("", encoded(".jpg")), (".image", encoded(".png")), (".PNG_large", encoded(".png")), (".jpg", encoded(".webp")), (".png", encoded(".png", DEEP)), (".tif", encoded(".tif", DEEP[..., 0])), (".png", encoded(".png", DEEP[..., 0]))])
def test_a_class_of_unusual_images(tmp_path, ending, data):
    "All of a class are of one kind that OpenCV decodes: it is there, and shards hold what every engine decodes."
    pets(tmp_path, {f"cow/{i}{ending}": data for i in range(3)})
    source, index = ingested("pets", tmp_path)
    cows = index.filter(label="cow")
    assert len(cows) == 3 and cows["content"].null_count() == 0 and not source.left_out
    for _, stored in read_encoded(tmp_path / "shards", cows): assert stored[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0", b"RIFF") and cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_UNCHANGED).dtype == np.uint8
    assert bool(source.changed) == (data[:4] not in (b"\x89PNG", b"\xff\xd8\xff\xe0", b"RIFF") or data == encoded(".png", DEEP) or data == encoded(".png", DEEP[..., 0]))
    if source.changed: assert any(r.startswith("changed: 3 images: ") and "cow/0" in r for r in source.reasons)

def test_sixteen_bits_are_scaled(tmp_path):
    pets(tmp_path, {"cow/0.png": encoded(".png", DEEP), "cow/1.tif": encoded(".tif", DEEP)})
    _, index = ingested("pets", tmp_path)
    for _, stored in read_encoded(tmp_path / "shards", index.filter(label="cow")):
        assert np.abs(decode(stored)[..., ::-1] - DEEP / 257).max() < 1

BAD = {"heic": ("1.heic", HEIC, "HEIC, which OpenCV does not decode"), "heic as jpg": ("1.jpg", HEIC, "is HEIC, which OpenCV does not decode"), "heic, no ending": ("1", HEIC, "HEIC, which OpenCV does not decode"),
       "torn": ("1.png", png(1)[:40], "damaged or cut short"), "empty": ("1.jpg", b"", "is empty"), "a web page": ("1.jpg", b"<!doctype html>", "a web page, no image"),
       "floats": ("1.tif", encoded(".tif", np.ones((4, 4), np.float32)), "float32 values"), "svg": ("1.svg", b"<svg>", "SVG, which OpenCV does not decode"), "gone": ("1.png", None, "leads nowhere")}

@pytest.mark.parametrize("case", BAD)
def test_a_class_that_loses_all(tmp_path, case):
    "One line: the class, how many, why. Among good ones of its class the same file is counted, and nothing stops."
    name, data, why = BAD[case]
    def bad(folder):
        if data is not None: put(folder / "cow" / name, data)
        else: (folder / "cow").mkdir(exist_ok=True); (folder / "cow" / name).symlink_to("nowhere")
    bad(pets(tmp_path / "lost", {}))
    says(lambda: ingested("pets", tmp_path / "lost"), "class 'cow'", "1", f"cow/{name}", why)
    bad(pets(tmp_path / "kept", {"cow/good.png": png(1), "cow/good2.png": png(2)}))
    source, index = ingested("pets", tmp_path / "kept")
    left = [t for t in source.left_out.values() if f"cow/{name}" in t.names and why in t.reason]
    assert len(index.filter(pl.col("content").is_not_null())) == 8 and (left or index.filter(name=f"cow/{name}")["content"].null_count() == 1)
    assert not left or any(why in r and f"cow/{name}" in r for r in source.reasons)

ENCODINGS = {"latin-1": False, "cp1252": False, "utf-8": True, "utf-8-sig": True, "utf-16": True, "utf-16-le": False}

@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_encodings_of_a_label_file(tmp_path, encoding, delimiter):
    "It is read where the encoding is certain, else it stops the run; in no case the folders become the classes."
    for i in range(6): put(tmp_path / "x" / "ab"[i % 2] / f"{i}.png", png(i))
    lines = [delimiter.join(("file", "label")), *(delimiter.join((f"{i}.png", ("thé", "café")[i // 3])) for i in range(6))]
    put(tmp_path / "x/labels.csv", "\n".join(lines).encode(encoding))
    if ENCODINGS[encoding]:
        says(lambda: open_source("x", tmp_path), "mixes a label file, labels.csv", "2 sub-folders") # both are there, so it asks
        assert ingested("x/labels.csv?file=file", tmp_path)[1]["label"].to_list() == ["thé"] * 3 + ["café"] * 3
    elif encoding == "utf-16-le": says(lambda: open_source("x", tmp_path), "labels.csv", "zero bytes")
    else: says(lambda: open_source("x", tmp_path), "x/labels.csv, line 2, column 'label'", "is not UTF-8", "save the file as UTF-8", "iconv")

def test_bad_rows_of_a_label_file(tmp_path):
    for i in range(9): put(tmp_path / f"x/{i}.png", png(i))
    rows = ["0,cat", "1,dog", "2,cat", "3,dog", "4,cat", "99,cat", "5,", ",dog", "0,cat", "1,cat"]
    put(tmp_path / "x/labels.csv", "\n".join(["file,label", *rows]))
    source, index = ingested("x", tmp_path)
    assert index["label"].to_list() == ["cat", "dog", "cat", "dog", "cat", "cat"] # 1 is labelled twice: the audit tells
    told = {t.reason.split(" in ")[0]: (t.n, *t.names) for t in source.left_out.values()}
    assert told == {"no such image": (1, "row 6: 99"), "no label": (1, "row 7: 5"), "no image is named": (1, "row 8"), "named before, with the same label": (1, "row 9: 0"), "no row": (3, "6.png", "7.png", "8.png")}
    assert sum(r.startswith("left out: ") for r in source.reasons) == 5
    put(tmp_path / "x/labels.csv", "\n".join(["file,label", *rows, "88,cow"]))
    says(lambda: ingested("x", tmp_path), "labels.csv", "class 'cow' has lost all its samples (1)", "no such image", "row 6: 99, row 11: 88")
    put(tmp_path / "x/labels.csv", "\n".join(["file,label", *rows, *(f"{i},cat" for i in range(100, 108))]))
    says(lambda: ingested("x/labels.csv?file=file", tmp_path), "10 samples are lost, only 6 are left; 9 rows: no such image", never=["no label"])
    says(lambda: open_source("x", tmp_path), "9 images without labels", "labels.csv: no label file, since only 44% of its first rows name an image")

@pytest.mark.parametrize("text", ["./photos/", "photos/../photos", "photos/", "photos//", "~/photos", "{home}/photos", "../home/photos/."])
def test_one_way_to_write_a_source(tmp_path, text, monkeypatch):
    "As `mlkit new` is called from a folder, and as `params.yaml` may say it by hand."
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    for c in "ab": put(home / "photos" / c / "1.png", png(1))
    text = text.format(home=home)
    assert normalised(text, home / "project", here=home) == "../photos" and normalised(text, home) == "photos"
    assert detect(text, home) == detect("photos", home) and watched(text, home) == "photos"

# Own sources

SHOP = '''
import polars as pl
from mlkit.sources.base import Source, source

@source("shop")
class Shop(Source):
    def rows(self, chunk_rows=100_000): yield pl.DataFrame({"name": [self.name]})
'''

def test_a_source_of_a_project(tmp_path, monkeypatch):
    "One class in `nbs/task.ipynb`, that is in `task.py`, and no edit of mlkit: by name, by scheme, as what a stage depends on."
    monkeypatch.delitem(sys.modules, "task", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    put(tmp_path / "task.py", SHOP)
    try:
        assert rows("shop", tmp_path).item() == "shop" and rows("shop://orders/2024", tmp_path).item() == "shop://orders/2024"
        assert watched("shop", tmp_path) == watched("shop://x", tmp_path) == "task.py" and look("shop", tmp_path) is None
        assert normalised("shop", tmp_path) == "shop"
    finally: SOURCES.pop("shop", None)
    monkeypatch.delitem(sys.modules, "task", raising=False)
    put(tmp_path / "task.py", SHOP + "\n1 / 0\n")
    says(lambda: open_source("stop", tmp_path), "task.py", "ZeroDivisionError", "mend nbs/task.ipynb")
    SOURCES.pop("shop", None)


def test_entry_point(tmp_path, monkeypatch):
    put(tmp_path / "shop.py", "import polars as pl\nfrom mlkit.sources.base import Source\nclass Shop(Source):\n    def rows(self, chunk_rows=100_000): yield pl.DataFrame({'name': [self.name]})\n")
    put(tmp_path / "shop-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: shop\nVersion: 1\n")
    put(tmp_path / "shop-1.dist-info/entry_points.txt", "[mlkit.sources]\nshop = shop:Shop\nbroken = nowhere:Shop\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert rows("shop").item() == "shop" and rows("shop://orders/2024").item() == "shop://orders/2024" and "shop" not in SOURCES
    says(lambda: open_source("broken", tmp_path), "nowhere:Shop", "cannot be imported", "uninstall")

# Hugging Face

def test_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="not run: Hugging Face's datasets is not installed (pip install datasets)")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = datasets.Dataset.from_dict({"image": [{"bytes": png(i), "path": None} for i in range(6)], "label": [i % 2 for i in range(6)]}, features=features)
    datasets.DatasetDict({"train": pictures, "test": pictures.select([1])}).save_to_disk(tmp_path / "both")
    pictures.to_parquet(tmp_path / "p/a.parquet")
    found = list(open_source("both", tmp_path).images())
    assert [s.label for s in found] == ["cat", "dog"] * 3 + ["dog"] and found[6].name.startswith("test/") and found[2].data == png(2)
    assert [s.data for s in open_source("both/test", tmp_path).images()] == [png(1)] and [s.data for s in open_source("p", tmp_path).images()] == [png(i) for i in range(6)]
    assert detect("both", tmp_path)[0] == "image"
    table = datasets.Dataset.from_dict({"x": [1, 2, 3], "t": ["a", None, "c"], "y": [1, 0, -1]}, features=datasets.Features({"x": datasets.Value("int32"), "t": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "yes"])}))
    table.save_to_disk(tmp_path / "table")
    table.filter(lambda r: r["x"] > 1).save_to_disk(tmp_path / "some") # indices are flattened
    assert rows("table", tmp_path).rows() == [(1, "a", "yes"), (2, None, "no"), (3, "c", None)] and rows("some", tmp_path)["x"].to_list() == [2, 3]
    says(lambda: open_source("both?label=lable", tmp_path), "no column 'lable'", "did you mean 'label'?")
    arrow = next((tmp_path / "table").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    says(lambda: rows("table", tmp_path), "table/data-0", "cannot be read")
    put(tmp_path / "table/state.json", "{}")
    says(lambda: rows("table", tmp_path), "state.json", "save the dataset again")

# PostgreSQL

@pytest.fixture(scope="module")
def postgres():
    "A server of its own on loopback, with a password. Gives the URL of its database."
    pytest.importorskip("adbc_driver_postgresql", reason="not run: no PostgreSQL driver (pip install -e '.[sql]')")
    places = os.pathsep.join([os.environ["PATH"], *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)])
    tools = {t: shutil.which(t, path=places) for t in ("initdb", "pg_ctl")}
    if not all(tools.values()): pytest.skip("not run: no PostgreSQL server here (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="mlkit-pg-"))
    user = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {} # the server refuses to run as root
    if user: os.chown(folder, 65534, 65534)
    put(folder / "pw", "s3cret\n").chmod(0o644)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    def run(tool, *args): subprocess.run([tools[tool], "-D", str(folder / "data"), *args], cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=600, **user)
    old = os.environ.get("PGPASSWORD")
    os.environ["PGPASSWORD"] = "s3cret"
    try:
        run("initdb", "-A", "scram-sha-256", "-U", "tester", f"--pwfile={folder / 'pw'}", "--no-sync", "-E", "UTF8", "--locale=C")
        run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off", "start")
        try: yield f"postgresql://tester@127.0.0.1:{port}/postgres"
        finally: run("pg_ctl", "-m", "immediate", "stop")
    finally:
        os.environ.pop("PGPASSWORD") if old is None else os.environ.update(PGPASSWORD=old)
        shutil.rmtree(folder)

def ask(url, *statements):
    from adbc_driver_postgresql import dbapi
    with dbapi.connect(url, autocommit=True) as db, db.cursor() as cursor:
        for s in statements: cursor.execute(s)

def test_postgres_alone_has_to_choose(postgres):
    says(lambda: open_source(postgres, Path("/")), "holds no tables")
    ask(postgres, "CREATE TABLE single (x int)")
    assert rows(postgres).shape == (0, 1)
    ask(postgres, 'CREATE TABLE "Two ""2""" (x int)', 'INSERT INTO "Two ""2""" VALUES (1)')
    says(lambda: open_source(postgres, Path("/")), "holds 2 tables (Two \"2\", single)", "?table=")
    assert rows(postgres + '?table=Two "2"').rows() == [(1,)]
    ask(postgres, 'DROP TABLE single, "Two ""2"""')

def test_postgres_types_and_order(postgres):
    ask(postgres, "CREATE TYPE mood AS ENUM ('sad', 'happy')", """CREATE TABLE t (b int, a text, n numeric(10, 2), f real, ok bool, d date, ts timestamp, tz timestamptz, j jsonb, m mood, l int[], i interval, PRIMARY KEY (a, b))""",
        "SET timezone = 'Asia/Tokyo'", """INSERT INTO t VALUES (2, 'x', 1.25, 0.5, true, '2024-02-29', '2024-02-29 12:00', '2024-02-29 12:00+09', '{"k": 1}', 'happy', '{1,2}', '1 day'), (1, 'x'), (9, 'a', 'NaN')""".replace("(1, 'x')", f"(1, 'x'{', NULL' * 10})").replace("'NaN')", f"'NaN'{', NULL' * 9})"))
    df = rows(postgres + "?table=t")
    assert df.select("a", "b").rows() == [("a", 9), ("x", 1), ("x", 2)] # by the primary key, in its order
    assert dict(df.schema) == {"b": pl.Int32, "a": pl.String, "n": pl.Float64, "f": pl.Float32, "ok": pl.Boolean, "d": pl.Date, "ts": pl.Datetime("us"), "tz": pl.Datetime("us", "UTC"),
                               "j": pl.String, "m": pl.String, "l": pl.String, "i": pl.String}
    last = df.row(2, named=True)
    assert last["n"] == 1.25 and str(last["tz"]) == "2024-02-29 03:00:00+00:00" and (last["j"], last["m"], last["l"], last["i"]) == ('{"k": 1}', "happy", "{1,2}", "1 day")
    assert open_source(postgres + "?table=t", Path("/")).reasons[1] == "in the order of the primary key (a, b)"
    ask(postgres, "CREATE SCHEMA shop", "CREATE TABLE shop.orders (x int, y text)", "INSERT INTO shop.orders VALUES (3, 'a'), (1, 'b'), (1, 'a')")
    assert rows(postgres + "?table=shop.orders").rows() == [(1, "a"), (1, "b"), (3, "a")] # no key: by all columns
    assert rows(postgres + "?query=SELECT x + 1 AS z FROM shop.orders WHERE y LIKE 'a%25'; ").rows() == [(2,), (4,)]
    assert rows(postgres + "?query=SELECT y, x FROM shop.orders ORDER BY x DESC, y").rows() == [("a", 3), ("a", 1), ("b", 1)]
    assert rows(postgres + "?sslmode=prefer&table=shop.orders&application_name=mlkit").height == 3 # the rest is for the server

def test_postgres_stream(postgres):
    ask(postgres, "CREATE TABLE big AS SELECT i AS id, i / 7.0::float8 AS x, 's' || i AS s FROM generate_series(1, 300000) i ORDER BY random()")
    parts = list(open_source(postgres + "?table=big", Path("/")).rows(chunk_rows=50_000))
    df = pl.concat(parts)
    assert max(map(len, parts)) <= 50_000 and df["id"].to_list() == list(range(1, 300_001)) and len({tuple(p.schema.items()) for p in parts}) == 1
    ask(postgres, "UPDATE big SET x = x", "VACUUM FULL big") # rows lie elsewhere now
    assert rows(postgres + "?table=big").equals(df)
    seen = look(postgres + "?table=big", Path("/"))
    ask(postgres, "UPDATE big SET x = x") # the same rows
    assert look(postgres + "?table=big", Path("/")) == seen
    ask(postgres, "INSERT INTO big VALUES (300001, 1, 'new')")
    assert (more := look(postgres + "?table=big", Path("/"))) != seen
    ask(postgres, "UPDATE big SET x = 2 WHERE id = 300001")
    assert look(postgres + "?query=SELECT * FROM big", Path("/")) not in (seen, more)
    assert rows(postgres + "?table=big").head(300_000).equals(df) # a new row, the old ones as they were

def test_postgres_wrong(postgres, monkeypatch):
    ask(postgres, "CREATE TABLE keep (x int)", "INSERT INTO keep VALUES (1)")
    port = re.search(r":(\d+)/", postgres)[1]
    for name, words in {"?table=kep": ["no table 'kep'", "did you mean 'keep'?"], "?query=SELEC 1": ["syntax error"], "?query=SELECT nope FROM keep": ['column "nope" does not exist'], "?query=SELECT x, x FROM keep": ["'x' twice"],
                        "?table=keep&query=SELECT 1": ["give one"], "?query=DELETE FROM keep RETURNING x": ["check the table and the query"], "?query=SELECT 1; DROP TABLE keep": ["check the table and the query"],
                        "?query=SELECT 1) AS q; DROP TABLE keep; --": ["check the table and the query"], "?nonsense=1&table=keep": ["nonsense"]}.items(): says(lambda: rows(postgres + name), *words)
    ask(postgres, "CREATE FUNCTION drain() RETURNS int LANGUAGE sql AS 'DELETE FROM keep RETURNING x'")
    says(lambda: rows(postgres + "?query=SELECT drain() AS x"), "read-only transaction")
    assert rows(postgres + "?table=keep").height == 1
    says(lambda: rows(postgres.replace("/postgres", "/nodb")), 'database "nodb" does not exist')
    says(lambda: rows(postgres.replace(port, "1")), "Connection refused", "check host, port")
    says(lambda: rows(postgres.replace("tester@", "tester:s3cret@")), "take it out", "PGPASSWORD", never=["s3cret"])
    monkeypatch.setenv("PGPASSWORD", "wr0ng")
    says(lambda: rows(postgres + "?table=keep"), "password authentication failed", "PGPASSWORD", never=["wr0ng"])
    monkeypatch.delenv("PGPASSWORD")
    says(lambda: rows(postgres + "?table=keep"), "asks for a password", "~/.pgpass")
    monkeypatch.setitem(sys.modules, "adbc_driver_postgresql", None)
    says(lambda: rows(postgres + "?table=keep"), "needs a driver", "pip install adbc-driver-postgresql")

# Elsewhere

@pytest.fixture(scope="module")
def s3():
    "A client of an S3 server on loopback."
    pytest.importorskip("s3fs", reason="not run: no s3fs (pip install -e '.[s3]')")
    moto = pytest.importorskip("moto.server", reason="not run: no S3 server (pip install 'moto[server]')")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    new = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "k3y", "AWS_SECRET_ACCESS_KEY": "s3cret", "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"}
    old = {k: os.environ.get(k) for k in new}
    os.environ.update(new)
    try:
        import boto3
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        yield client
    finally:
        for k, v in old.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})
        server.stop()

@pytest.fixture
def project(tmp_path): (tmp_path / "params.yaml").touch(); return tmp_path

def test_s3_images_grow(s3, project):
    for c, i in (("a", 1), ("a", 2), ("b", 3)): s3.put_object(Bucket="data", Key=f"pets/{c}/{i}.png", Body=png(i))
    s3.put_object(Bucket="data", Key="pets/", Body=b"") # as consoles make folders
    def ingest(): return write_shards(open_source("s3://data/pets", project).images(), project / "shards", cache=project / ".mlkit/cache")
    assert ingest()["name"].to_list() == ["a/1.png", "a/2.png", "b/3.png"]
    copy, = (p for p in (project / ".mlkit/cache/remote").iterdir() if p.is_dir())
    seen = look("s3://data/pets", project)
    assert look("s3://data/pets", project) == seen
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*.png")}
    s3.put_object(Bucket="data", Key="pets/b/4.png", Body=png(4)); s3.put_object(Bucket="data", Key="pets/b/3.png", Body=png(33)); s3.delete_object(Bucket="data", Key="pets/a/1.png")
    assert look("s3://data/pets", project) != seen and not (copy / "b/4.png").exists() # looked at, not fetched
    index = ingest()
    assert index["name"].to_list() == ["a/2.png", "b/3.png", "b/4.png"]
    after = {p: p.stat().st_mtime_ns for p in copy.rglob("*.png")}
    assert [p.name for p in after if before.get(p) == after[p]] == ["2.png"] # the one that did not change was not fetched again
    full = write_shards(open_source("s3://data/pets", project).images(), project / "full")
    assert full.equals(index) and all(f.read_bytes() == (project / "full" / f.name).read_bytes() for f in (project / "shards").iterdir())

def test_s3_tables(s3, project):
    pl.DataFrame({"x": [1, 2]}).write_parquet(f := io.BytesIO()); s3.put_object(Bucket="data", Key="t/year=2024/p.parquet", Body=f.getvalue())
    s3.put_object(Bucket="data", Key="one/a.csv.gz", Body=gzip.compress(b"x,y\n1,2\n")); s3.put_object(Bucket="data", Key="bad/a.parquet", Body=b"PAR1")
    assert rows("s3://data/t", project).rows() == [(1, "2024"), (2, "2024")]
    assert rows("s3://data/one/a.csv.gz", project).rows() == rows("s3://data/one/*.gz", project).rows() == [("1", "2")]
    assert detect("s3://data/one/a.csv.gz", project)[0] == "rows"
    says(lambda: rows("s3://data/bad", project), "s3://data/bad/a.parquet: cannot be read", never=[".mlkit"])

def test_s3_leaves_nothing_outside_a_project(s3, tmp_path):
    s3.put_object(Bucket="data", Key="one/a.csv.gz", Body=gzip.compress(b"x,y\n1,2\n"))
    assert rows("s3://data/one/a.csv.gz", tmp_path).height == 1 and list(tmp_path.iterdir()) == []

def test_s3_wrong(s3, project, monkeypatch):
    says(lambda: open_source("s3://data/none", project), "s3://data/none: nothing there")
    says(lambda: open_source("s3://data/none.csv", project), "nothing there")
    says(lambda: open_source("s3://nobucket/x", project), "s3://nobucket/x: nothing there")
    says(lambda: open_source("s3://data/none/*.csv", project), "holds no files")
    says(lambda: open_source("s4://data", project), "no way to open 's4://'")
    says(lambda: open_source("postgre://h/db", project), "did you mean 'postgres'?")
    says(lambda: open_source("s3://k3y:s3cret@data/x.csv", project), "take it out", never=["s3cret"])
    s3.put_object(Bucket="data", Key="evil/../../../../x.csv", Body=b"x\n1\n")
    says(lambda: open_source("s3://data/evil", project), "s3://data/evil") # refused, or not listed: nothing is written outside
    assert not (project.parent / "x.csv").exists()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(SetupError, match="Install s3fs"): open_source("s3://data/other.csv", project)

def test_http(project):
    put(project / "www/a.csv", "x\n1\n")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None}), directory=project / "www")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            assert rows(f"{url}/a.csv", project).rows() == [("1",)]
            seen = look(f"{url}/a.csv", project)
            assert look(f"{url}/a.csv", project) == seen
            put(project / "www/a.csv", "x\n2\n"); os.utime(project / "www/a.csv", (1, 1)) # of the same size
            assert look(f"{url}/a.csv", project) != seen and rows(f"{url}/a.csv", project).rows() == [("2",)]
            says(lambda: open_source(f"{url}/b.csv", project), "b.csv: nothing there")
            says(lambda: open_source(f"{url}/a.csv?token=s3cret", project), "take it out", never=["s3cret"])
        finally: server.shutdown()
    says(lambda: open_source(f"{url}/a.csv", project), "check the name, and the network")
