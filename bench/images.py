"""Images decoded and augmented for training, a second and a core: mlkit's two engines against a torch DataLoader with Pillow and with OpenCV.

    python bench/images.py [--images 2000] [--repeats 7] [--threads 2]

The same JPEGs (256 x 320, quality 90, made here), the same work: decode, cut a random part out, resize to 224, flip, normalise, float32 planes in batches of 64.
Interleaved: each repeat runs every contender once. Without DALI its row says so."""
import argparse, os, platform, statistics, sys, tempfile, time
from pathlib import Path

import cv2, numpy as np, torch
from mlkit.core import SetupError
from mlkit.data.shards import Sample, write_shards
from mlkit.data.stream import Loader, Recipe
from PIL import Image

SIZE, MEAN, STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

def photos(n):
    random = np.random.default_rng(0)
    for i in range(n):
        x = cv2.resize(random.integers(0, 256, (32, 40, 3), dtype=np.uint8), (320, 256), interpolation=cv2.INTER_CUBIC)
        x = np.clip(x + random.normal(0, 6, x.shape), 0, 255).astype(np.uint8)
        yield Sample(str(i), cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes(), "jpg", str(i % 10))

class Files(torch.utils.data.Dataset):
    "What people write: a file an image, random numbers drawn in the worker."
    def __init__(self, paths): self.paths = paths
    def __len__(self): return len(self.paths)
    def cut(self, h, w):
        side = int(min((np.random.uniform(0.4, 1) * h * w) ** 0.5, h, w))
        return np.random.randint(h - side + 1), np.random.randint(w - side + 1), side, np.random.rand() < 0.5

class WithPillow(Files):
    def __getitem__(self, i):
        with Image.open(self.paths[i]) as f: x = f.convert("RGB")
        t, l, side, flip = self.cut(x.height, x.width)
        x = x.resize((SIZE, SIZE), Image.BILINEAR, box=(l, t, l + side, t + side))
        if flip: x = x.transpose(Image.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(np.array(x)).permute(2, 0, 1).float().div_(255)
        return x.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])

class WithOpenCV(Files):
    def __getitem__(self, i):
        x = cv2.cvtColor(cv2.imread(str(self.paths[i])), cv2.COLOR_BGR2RGB)
        t, l, side, flip = self.cut(*x.shape[:2])
        x = cv2.resize(x[t:t + side, l:l + side], (SIZE, SIZE))
        if flip: x = cv2.flip(x, 1)
        x = torch.from_numpy(x).permute(2, 0, 1).float().div_(255)
        return x.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])

def cpu(): t = os.times(); return t.user + t.system + t.children_user + t.children_system

def timed(batches):
    "Seconds of wall and of CPU, the children's too, and how many images came."
    begin, used, n = time.perf_counter(), cpu(), 0
    for b in batches(): n += len(b[0] if isinstance(b, (tuple, list)) else b)
    return time.perf_counter() - begin, cpu() - used, n

def main():
    p = argparse.ArgumentParser(); p.add_argument("--images", type=int, default=2000); p.add_argument("--repeats", type=int, default=7); p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    cv2.setNumThreads(1); torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d); samples = list(photos(a.images))
        index = write_shards(iter(samples), d / "shards", 500)
        for s in samples: (d / f"{s.name}.jpg").write_bytes(s.data)
        paths, labels, recipe = [d / f"{s.name}.jpg" for s in samples], np.zeros(a.images, np.int64), Recipe(SIZE, MEAN, STD, (0.4, 1.0), True)
        def torch_loader(kind): return lambda: torch.utils.data.DataLoader(kind(paths), 64, shuffle=True, num_workers=a.threads)
        def ours(engine):
            def run():
                loader = Loader(d / "shards", index, labels, recipe, 64, engine=engine, n_threads=a.threads)
                yield from loader.batches(loader.order(0), loader.batch_size, 0)
                loader.close()
            return run
        contenders = {"torch DataLoader with Pillow": torch_loader(WithPillow), "torch DataLoader with OpenCV": torch_loader(WithOpenCV), "mlkit with OpenCV": ours("opencv"), "mlkit with DALI (CPU mode)": ours("dali-cpu")}
        seen = {k: [] for k in contenders}
        for r in range(-1, a.repeats): # the first, of each, warms up
            for name, run in contenders.items():
                if seen[name] is None: continue
                try: wall, used, n = timed(run)
                except SetupError as e: seen[name] = None; print(f"{name}: not run, {e}", file=sys.stderr); continue
                assert n == a.images, (name, n)
                if r >= 0: seen[name].append((n / wall, n / used))
                print(f"repeat {r + 1}: {name}: {n / wall:.0f} images/s, {n / used:.0f} a core second", file=sys.stderr)
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"OpenCV {cv2.__version__}", f"Pillow {Image.__version__}"]
    try: import nvidia.dali; versions.append(f"DALI {nvidia.dali.__version__}")
    except ImportError: pass
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, {', '.join(versions)}; {a.images} JPEGs of 256 x 320, {a.threads} threads or workers, {a.repeats} repeats, in turn\n")
    print("| | images/s, median | min | max | a core second | against Pillow, a core second |\n|---|---|---|---|---|---|")
    base = statistics.median(c for _, c in seen["torch DataLoader with Pillow"])
    for name, rows in seen.items():
        if rows is None: print(f"| {name} | not run: not installed | | | | |"); continue
        wall, core = [w for w, _ in rows], statistics.median(c for _, c in rows)
        print(f"| {name} | {statistics.median(wall):.0f} | {min(wall):.0f} | {max(wall):.0f} | {core:.0f} | {core / base:.2f} |")

if __name__ == "__main__": main()
