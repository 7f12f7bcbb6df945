"""A thousand kinds of damaged or wrong input against every command: one line or a result, in bounded time and memory."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import encode, index, ingest, train
from pipelines.console.cli import COMMANDS, main

SECONDS, MEMORY = 60, 2 << 30  # of a command; by which this process may grow in all
EVALUATE = "evaluate run --query handwritten/test --database typeset/train"
OPTIONS = "--source typeset --target handwritten --bits 16 --per-class 2 --epochs 1 --steps-per-epoch 1 --workers 0 --threads 1 --tracking none --no-plots"


class Exploit:
    """Touches a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch unpickled",)


@pytest.fixture(scope="module")
def good(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a small dataset, a run, codes, an index and images, which is also the working directory."""
    root = tmp_path_factory.mktemp("bad-input") / "good"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        patched.setenv("HOME", str(root))
        for domain in ("typeset", "handwritten"):
            ingest.run(ingest.Config(str(few_digits.parent / f"{domain}.npz"), dataset="set", limit=120))
        made = train.run(train.make_config({
            "method": "dah", "dataset": "set", "source": "typeset", "target": "handwritten", "bits": 16, "per_class": 2, "epochs": 1,
            "steps_per_epoch": 2, "workers": 0, "threads": 1, "tracking": "none", "plots": False,
        }))  # fmt: skip
        (root / "runs" / made["run_id"]).rename(root / "runs" / "run")
        encode.run(encode.Config("run", "set", out="codes", domain="typeset"))
        index.run(index.Config("codes", out="i.index"))
        (root / "images").mkdir()
        for number in range(3):
            Image.fromarray(np.full((20, 20), number, np.uint8)).save(root / "images" / f"{number}.png")
        yield root


class Tally:
    """Runs commands and records what each did wrong."""

    def __init__(self, root: Path) -> None:
        self.root, self.kinds, self.wrong = root, 0, list[str]()
        self.refused = 0

    def __call__(self, kind: str, line: str | list[str], kinds: int = 1) -> None:
        argv = line.split() if isinstance(line, str) else line
        out, err = io.StringIO(), io.StringIO()
        self.kinds += kinds
        signal.signal(signal.SIGALRM, self._late)
        signal.alarm(SECONDS)
        status: Any = None
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main(argv)
        except SystemExit as ended:
            helped = {"-h", "--help"} & set(argv) or not [each for each in argv if each[:1] != "-"]
            status = 0 if ended.code in (0, 2) and helped else f"SystemExit {ended.code}"
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"[:300]
        finally:
            signal.alarm(0)
        said = [text for text in err.getvalue().splitlines() if text.startswith("hashbridge: ")]
        self.refused += status == 2
        clear = not said if status == 0 else status == 2 and len(said) == 1 and len(said[0]) < 1200 and said[0].isprintable()
        if not clear or "Traceback" in out.getvalue() + err.getvalue():
            self.wrong.append(f"{kind}: {' '.join(argv)[:200]}: {status} {said}")

    @staticmethod
    def _late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("a command hangs")

    def on(self, kind: str, path: Path, damage: Callable[[bytes], bytes], line: str, settle: Callable[[], None] = lambda: None) -> None:
        """Run a command with a damaged file, then restore the file."""
        whole = path.read_bytes()
        try:
            path.write_bytes(damage(whole))
            settle()
            self(kind, line)
        finally:
            path.write_bytes(whole)
            settle()

    def wrong_of(self, at_least: int) -> str:
        """What the commands did wrong, of at least so many kinds of input; "" if nothing."""
        assert self.kinds >= at_least and self.refused > 0 and not (self.root / "unpickled").exists()
        return "\n".join(self.wrong[:25])


@pytest.fixture
def tally(good: Path) -> Iterator[Tally]:
    """Runs commands in the good folder, where nothing may change but their outputs."""
    before, grown = tree(good), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield Tally(good)
    for name in ("new", "out"):
        shutil.rmtree(good / name, ignore_errors=True)
    assert tree(good) == before
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) << 10 < MEMORY


def tree(root: Path) -> set[str]:
    """All paths of a folder and its parent, except the commands' outputs."""
    found = {str(each.relative_to(root)) for each in root.rglob("*")} | {f"../{each.name}" for each in root.parent.iterdir()}
    return {each for each in found if not re.match(r"new|out|\.cache|\.config|runs/(dah-|mlflow\.db|mlartifacts)", each)}


def bytes_damaged(draw: random.Random, content: bytes) -> bytes:
    """A file that is truncated, has flipped bits or swapped, doubled or blanked parts, or is replaced by something else."""
    kind, at = draw.randrange(9), draw.randrange(len(content) + 1)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return bytes(byte ^ (1 << draw.randrange(8) if draw.random() < 0.01 else 0) for byte in content)
    if kind == 2:
        return content[at:] + content[:at]
    if kind == 3:
        return content[:at] + bytes(64) + content[at + 64 :]
    if kind == 4:
        return draw.randbytes(max(16, at // 2))
    if kind == 5:
        return pickle.dumps(Exploit())
    if kind == 6:
        return b"\xff" * 8 + content[8:]
    return content + content if kind == 7 else b""


ODD: list[Any] = [
    None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "x" * 10_000, "../../etc/passwd", "\x1b[31m\n", "\u202e", [], {}, [[]], {"a": None},
    "s3://none/x", [None], ["a"] * 3, {"": {}},
]  # fmt: skip


def json_damaged(draw: random.Random, content: bytes) -> bytes:
    """JSON with a value that is missing, of another type or out of range; or damaged bytes, or endless nesting."""
    kind = draw.random()
    if kind < 0.15:
        return bytes_damaged(draw, content)
    if kind < 0.18:
        return b"[" * 100_000
    lines = content.decode().splitlines() if content.count(b"\n{") else [content.decode()]
    value: Any = json.loads(lines[0])
    place = value
    while True:
        key: Any = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
        if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.75:
            place = place[key]
            continue
        break
    if draw.random() < 0.25:
        del place[key]
    else:
        place[key] = draw.choice(ODD)
    return "\n".join([json.dumps(value), *lines[1:]]).encode()


def test_json_that_was_damaged(good: Path, tally: Tally) -> None:
    draw = random.Random(0)
    run = good / "runs" / "run"
    state = next(run.glob("checkpoints/*/state.json"))

    def again() -> None:
        from pipelines.training import checkpoint

        (state.parent / "digests.json").write_text(json.dumps(checkpoint._digests(state.parent)))

    of_dataset = [f"train dah --dataset set --storage new {OPTIONS}", EVALUATE, "search i.index set#typeset/train#0-1 -k 2"]
    of_run = [
        EVALUATE, "sync run", "translate run images --out out", "register run --name m --tracking none", "search i.index images --model run",
    ]  # fmt: skip
    for number in range(150):
        tally.on("manifest", good / "set" / "manifest.json", lambda content: json_damaged(draw, content), of_dataset[number % 3])
    for number in range(100):
        tally.on("config", run / "config.json", lambda content: json_damaged(draw, content), of_run[number % 5])
    for number in range(40):
        tally.on("result", run / "result.json", lambda content: json_damaged(draw, content), of_run[1 + 2 * (number % 2)])
    for _ in range(20):
        tally.on("progress", run / "progress.jsonl", lambda content: json_damaged(draw, content), "sync run")
    for number in range(60):
        tally.on("state", state, lambda content: json_damaged(draw, content), of_run[number % 3], again)
    assert not tally.wrong_of(370)


def table_damaged(draw: random.Random, path: Path) -> bytes:
    """A Parquet file with a column that is missing, of another type, empty, out of range or of another size."""
    table = pq.read_table(path)
    name = draw.choice(table.schema.names)
    place, rows = table.schema.get_field_index(name), len(table)
    columns: list[Any] = [
        pa.nulls(rows, table.schema.field(name).type), pa.array(["x"] * rows), pa.array([-7] * rows), pa.array([b""] * rows), pa.array([b"x" * 3] * rows),
        pa.array([10**6] * rows, pa.int32()), pa.array([[1.0]] * rows), pa.array([2**62] * rows), pa.array(["\x1b[2J" + "y" * 10_000] * rows),
        pa.array([None if row % 2 else value for row, value in enumerate(table[name].to_pylist())], table.schema.field(name).type),
    ]  # fmt: skip
    kind = draw.randrange(len(columns) + 4)
    if kind < len(columns):
        made = table.set_column(place, name, columns[kind])
    else:
        rows_only = [table.drop_columns([name]), table.slice(0, rows // 2), table.slice(0, 0), pa.concat_tables([table, table])]
        made = rows_only[kind - len(columns)]
    out = io.BytesIO()
    pq.write_table(made.replace_schema_metadata(draw.choice([table.schema.metadata, {}, {b"model": b"nobody", b"bits": b"x"}])), out)
    return out.getvalue()


def test_shards_codes_and_indexes_that_were_damaged(good: Path, tally: Tally) -> None:
    draw = random.Random(1)
    shard = next((good / "set").glob("domain=typeset/split=train/*.parquet"))
    codes = next((good / "codes").glob("*.parquet"))
    uses = {
        shard: [f"train dah --dataset set --storage new {OPTIONS}", EVALUATE, "search i.index set#typeset/train#0-1"], codes: ["index codes --out new/i"],
        **{next((good / "i.index").glob(f"*.{kind}")): ["search i.index images -k 3"] for kind in ("parquet", "faiss", "json")},
    }  # fmt: skip
    for path, lines in uses.items():
        for number in range(70):
            damaged = number % 2 and path.suffix == ".parquet"
            tally.on(path.name, path, lambda content, path=path, damaged=damaged: table_damaged(draw, path) if damaged else bytes_damaged(draw, content),
                     lines[number % len(lines)])  # fmt: skip
    assert not tally.wrong_of(350)


def test_weights_that_were_damaged(good: Path, tally: Tally) -> None:
    from pipelines.training import checkpoint

    draw = random.Random(2)
    place = next((good / "runs" / "run" / "checkpoints").glob("epoch-*"))

    def again() -> None:
        (place / "digests.json").write_text(json.dumps(checkpoint._digests(place)))

    lines = [EVALUATE, "train --resume run --epochs 2 --tracking none", "search i.index images --model run"]
    for number in range(60):
        settle = again if number % 2 else (lambda: None)
        weights = place / ("optimizer.safetensors" if number % 4 == 3 else "model.safetensors")
        tally.on("weights", weights, lambda content: bytes_damaged(draw, content), lines[1] if number % 4 == 3 else lines[number % 3], settle)
        if not (place / "state.json").exists() or len(list(place.parent.iterdir())) > 1:
            for other in place.parent.glob("epoch-00002"):
                shutil.rmtree(other)
    assert not tally.wrong_of(60)


def npz(draw: random.Random) -> bytes:
    """An archive that is invalid, contains wrong arrays, or is a decompression bomb."""
    random_array = np.random.default_rng(draw.randrange(2**32))
    good = {"x_train": random_array.integers(0, 256, (20, 8, 8), np.uint8), "y_train": np.arange(20) % 2}
    out = io.BytesIO()
    kind = draw.randrange(12)
    if kind < 3:
        np.savez(out, **good)
        return bytes_damaged(draw, out.getvalue())
    if kind == 3:
        np.savez(out, x_train=np.array([Exploit()], object), y_train=good["y_train"])
        return out.getvalue()
    if kind in (4, 5):  # a header that claims what is not there
        shape = draw.choice(["(1000000, 1000, 1000)", "(-1, 8, 8)", "(20, 8)", "(" + "9" * 40 + ",)", "()", "(20, 8, 8" + ", 1" * 40 + ")"])
        kind_of = draw.choice(["'|u1'", "[]", "'|O'"])
        header = f"{{'descr': {kind_of}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(1280))
        return out.getvalue()
    if kind == 6:  # a gibibyte of nothing
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open("x_train.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 32, 32)})
            for _ in range(64):
                file.write(bytes(1 << 24))
        return out.getvalue()
    wrong: dict[str, Any] = {"x_train": draw.choice([
        np.zeros((0, 8, 8), np.uint8), np.zeros((20, 8, 8, 5), np.uint8), np.zeros(20, np.uint8), np.zeros((20, 8, 8), np.int64), np.zeros((20, 4), complex),
        np.array(["a"] * 20), np.zeros((20, 8, 8), "M8[s]"), np.zeros((20, 0, 8), np.uint8), np.full((20, 4), np.nan, np.float32),
        np.zeros((20, 0), np.float32),
    ])}  # fmt: skip
    if kind == 7:
        labels = draw.choice([np.zeros(3, int), np.zeros(20), np.full(20, -5), np.full(20, 2**62), np.zeros((20, 2), int)])
        wrong = {"x_train": good["x_train"], "y_train": labels}
    if kind == 8:
        wrong = good | {"classes": draw.choice([np.array(["a"]), np.zeros((2, 2)), np.array(["a", "a"]), np.array([""] * 2)])}
    if kind == 9:
        wrong = {"../x_train": good["x_train"]}
    if kind == 10:
        wrong = good | {"x_test": np.zeros((3, 9, 9), np.uint8), "x_..": good["x_train"]}
    np.savez(out, **wrong)
    return out.getvalue()


def test_archives_that_hold_something_else(good: Path, tally: Tally) -> None:
    draw = random.Random(3)
    (good / "out").mkdir()
    for number in range(120):
        (good / "out" / "a.npz").write_bytes(npz(draw))
        (good / "out" / f"not-{number}").mkdir()
        tally("npz", f"ingest out/a.npz --dataset new/set-{number} --domain d --size 8 --channels 1")
    assert not tally.wrong_of(120)


def image(draw: random.Random) -> bytes:
    """An image file that is damaged, of another kind, or of an unusual size or mode."""
    out, mode = io.BytesIO(), draw.choice(["1", "L", "LA", "P", "RGB", "RGBA", "I", "F", "I;16", "CMYK"])
    size = draw.choice([(1, 1), (1, 400), (37, 23), (64, 64)])
    kind = draw.choice(["PNG", "GIF", "TIFF", "WEBP", "PPM", "BMP", "JPEG"])
    with contextlib.suppress(OSError, ValueError, KeyError):
        Image.frombytes("L", size, draw.randbytes(size[0] * size[1])).convert(mode).save(out, kind)
    if not out.getvalue():
        Image.new("RGB", size).save(out, "PNG")
    if draw.random() < 0.05:  # a bomb: a header of 60,000 by 60,000 pixels
        return b"P5 60000 60000 255\n" + bytes(100)
    return bytes_damaged(draw, out.getvalue()) if draw.random() < 0.85 else out.getvalue()


NAMES = [
    "new\nline", "-rf", "--help", "a'b\"c", "$(touch unpickled)", "; touch unpickled", "back\\slash", "tab\t", "bell\x07\x1b[31m", "\u202egnp", "n" * 245,
    "%s%n", " ", "#0-5", "é", "日本", "a#b", "\udcff\udcfe",
]  # fmt: skip


def test_images_that_are_none_and_names_that_are_traps(good: Path, tally: Tally) -> None:
    draw = random.Random(4)
    folder = good / "out" / "class"
    folder.mkdir(parents=True)
    for number in range(200):
        (folder / f"{number}{draw.choice(['.png', '.jpg', '.gif', '.tif', '.webp', '.bmp'])}").write_bytes(image(draw))
    whole = (good / "images" / "0.png").read_bytes()
    for name in NAMES:
        (folder / f"{name}.png").write_bytes(whole)
    tally("images", "ingest out --dataset new/mixed --domain d --size 16 --channels 1")
    tally("images", "search i.index out/class -k 1 --grid new/grid.png")
    tally("images", "encode run out/class --out new/codes")
    made = [(good / "new" / name).exists() for name in ("mixed", "grid.png", "codes")]
    assert tally.refused == 3 and not any(made)  # what is white in the float files cannot be told
    tally("images", "ingest out --dataset new/set --domain d --size 16 --channels 1 --range 0-255", kinds=218)
    tally("images", "search i.index out/class -k 1 --grid new/grid.png --range 0-255", kinds=218)
    tally("images", "encode run out/class --out new/codes --range 0-255", kinds=218)
    for path in sorted(folder.iterdir())[:40]:
        tally("image", ["search", "i.index", str(path), "-k", "1"])
    tally("images", "search i.index out -k 0")
    assert (good / "new" / "codes").is_dir() and (good / "new" / "grid.png").is_file() and (good / "new" / "set" / "manifest.json").is_file()
    assert not tally.wrong_of(650)


YAML = [
    "!!python/object/apply:os.system ['touch unpickled']", "bits: !!python/object/new:os.system ['touch unpickled']", "a: &a [x, x]\nb: [*a, *a, *a]",
    "a: &a {<<: *a}", "[" * 1500, "{" * 1500, "bits: [64", "- 1\n- 2", "bits", "", "null", "42", "bits: {a: 1}", "bits: [1, 2]", "bits: null", "bits: 1.5",
    "bits: " + "9" * 5000, "bits: .inf", "bits: 2024-13-45", "epochs: -1", "epochs: yes", "1: 2", "? [a]\n: b", "method: [dah]", "method: igor", "\x00",
    "\xff\xfe", "bits: !!binary aGVsbG8=", "seed: !!int x", "seed: 0x", "storage: {}", "%YAML 9.9\n---\nbits: 8",
    "--- 1\n--- 2", "bits: 64\nbits: 32x", "own: {}", "drawn: {}",
    "workers: 1e9", "tracking: [http://x]", "config: other.yaml", "json: true", "help: 1", "plots: 'no'", "preset: best", "a" * 100_000, "source: 'a\x01b'",
]  # fmt: skip


def test_configs_that_are_none(good: Path, tally: Tally) -> None:
    (good / "out").mkdir()
    searching = OPTIONS.replace("--workers 0 ", "").replace("--no-plots", "")
    for number, text in enumerate(YAML):
        (good / "out" / "c.yaml").write_text(text, encoding="latin-1")
        tally("yaml", f"train dah --config out/c.yaml --dataset nowhere --storage new {OPTIONS.replace('--bits 16 --', '--')}")
        command = sorted(set(COMMANDS) - {"demo", "methods", "datasets"})[number % (len(COMMANDS) - 3)]
        tally("yaml", f"{command} --config out/c.yaml")
        tally("space", f"tune dah --dataset set --space out/c.yaml --study {number} --storage new {searching} --gpu")
    assert not tally.wrong_of(130)


class Evil:
    """A foreign model in MLflow's form."""

    def predict(self, model_input: Any) -> Any:
        """MLflow's interface."""
        return model_input

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch unpickled",)


def test_models_that_would_be_unpickled(good: Path, tally: Tally) -> None:
    from pipelines.registry.connection import connect

    client = connect(f"sqlite:///{good}/runs/mlflow.db")
    import mlflow

    folder = good / "out" / "evil"
    for number, loader in enumerate(("mlflow.pyfunc.model", "mlflow.pytorch", "os")):
        place = folder / str(number)
        (place / "data").mkdir(parents=True)
        for name in ("python_model.pkl", "data/model.pth"):
            (place / name).write_bytes(pickle.dumps(Evil()))
        (place / "MLmodel").write_text(json.dumps({
            "flavors": {
                "python_function": {"loader_module": loader, "python_model": "python_model.pkl", "data": "data", "python_version": "3.11.0", "env": {}},
                "pytorch": {"model_data": "data", "pytorch_version": "2.15.0", "code": None},
            },
            "signature": {"inputs": json.dumps([{"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [-1, 1, 28, 28]}}]),
                          "outputs": json.dumps([{"type": "tensor", "tensor-spec": {"dtype": "uint8", "shape": [-1, 2]}}])},
        }))  # fmt: skip
        with contextlib.suppress(mlflow.exceptions.MlflowException):
            client.create_registered_model("evil")
        client.create_model_version("evil", place.resolve().as_uri())
    for number in (1, 2, 3):
        tally("model", f"search i.index images --model models:/evil/{number}")
    assert tally.refused == 3
    assert not tally.wrong_of(3)


def test_words_that_are_no_command_line(good: Path, tally: Tally) -> None:
    draw = random.Random(5)
    words = [
        "", "-", "--", "---", "-k", "--bits", "--epochs", "--dataset", "set", "nowhere", "run", "dah", "igan", "models:/m@x", "models:/", "models:/../x@y",
        "s3://", "http://127.0.0.1:9", "set#typeset/train#0-9999999999999", "set##", "--seed", "-1", "1e400", "9" * 400, "nan", "\x1b[2J", "x\ny", "i.index",
        "codes", "--out", "out/x", "--storage", "runs", "--model", "--config", "/dev/null", "/proc/self/mem", "--name", "a/b", "--json", "images", "--k",
        "--grid", "--protocol", "cross", "--query", "a/b/c", "--trials", "--tracking", "none", "--preset", "--kind", "ivf", "--lists", "0",
    ]  # fmt: skip
    commands = sorted(set(COMMANDS) - {"demo", "submit", "serve", "methods", "datasets"})  # `serve i.index` would serve
    for number in range(200):
        chosen = [draw.choice(words) for _ in range(draw.randrange(1, 7))]
        if not {"dah", "igan"} & set(chosen) or "set" not in chosen:  # no training by chance
            tally("words", [commands[number % len(commands)], *chosen])
    for name in COMMANDS:
        tally("help", [name, "--help"])
        tally("unknown", [name, "--no-such-option"])
    assert not tally.wrong_of(180)
