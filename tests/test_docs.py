"""The documentation: its commands run as they are written, its example trains, and its reference lists every module."""

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from data import digits as embedded
from models.registry import METHODS
from pipelines import train
from pipelines.console.cli import main
from tests.servers import ROOT

RUN = re.compile(r"dah-[a-z]+-[a-z]+-64-[0-9a-f]{6}")  # a run's id, whose last part is drawn
LIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def run(line: str) -> str:
    """Run a command line of hashbridge in this process; what it printed."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        main(shlex.split(line, comments=True)[1:])
    return shown.getvalue()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_the_guide_prints_what_it_says(elsewhere: Path) -> None:
    checker, run_id, commands = doctest.OutputChecker(), "", 0
    for block in blocks("docs/guide.md", "console"):
        for line, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            shown = run(RUN.sub(run_id or "none", line))
            run_id = run_id or next(iter(RUN.findall(shown)), "")
            wanted = RUN.sub(run_id, expected)
            assert checker.check_output(wanted, shown, LIKE), f"{line}\nexpected:\n{wanted}\nshown:\n{shown}"
            commands += 1
    assert commands == 11 and (elsewhere / "found.png").stat().st_size > 5000


def test_the_readme_leads_from_photographs_to_a_search(elsewhere: Path) -> None:
    for folder, domain in (("studio", "typeset"), ("street", "handwritten")):
        images, labels = embedded.read(domain, "train", 0, 120)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            if label < 2:
                path = elsewhere / "shop" / folder / ("mug", "lamp")[label] / f"{index}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).convert("RGB").save(path)
    (elsewhere / "shop" / "street" / "mug" / "1.jpg").write_bytes(path.read_bytes())
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines() if line.startswith("hashbridge ")]
    assert [line.split()[1] for line in lines] == ["ingest", "embed", "train", "register", "encode", "index", "search"]
    run_id = ""
    for line in lines:
        shown = run(RUN.sub(run_id or "none", line))
        assert "hashbridge: " not in shown, shown
        run_id = run_id or next(iter(RUN.findall(shown)), "")
    assert "    5  distance" in shown and (elsewhere / "found.png").stat().st_size > 5000


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_example_of_a_method_trains(digits: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {"__name__": "mine"}
    (example,) = blocks("docs/adding-a-method.md", "python")
    exec(compile(example, "mine.py", "exec"), names)
    monkeypatch.setitem(METHODS, "mine", names["Mine"])  # type: ignore[arg-type]
    result = train.run(train.make_config({
        "method": "mine", "dataset": str(digits), "source": "typeset", "target": "handwritten", "epochs": 1, "steps_per_epoch": 20, "workers": 0,
        "tracking": "none", "plots": False,
    }))  # fmt: skip
    assert result["metrics"]["cross/map"] > 0.15  # chance is 0.1


def test_the_reference_lists_every_module() -> None:
    listed = {name for page in (ROOT / "docs" / "reference").glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)}
    packages = ("data", "models", "pipelines", "tuning", "infra")
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for package in packages for path in (ROOT / package).rglob("*.py")}
    assert listed == {name for name in modules if not name.endswith(("__init__", "__main__"))}
