"""The import arrows of the design, and what importing a package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"data", "models", "pipelines", "tuning", "infra"}
ALLOWED = {"data": {"data"}, "models": {"models"}, "infra": {"infra"}, "pipelines": {"pipelines", "data", "models", "infra"}, "tuning": OWN}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_arrows_point_downwards(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) & OWN <= ALLOWED[package], path


def test_mlflow_is_imported_in_one_file_and_ray_never_in_models() -> None:
    users = [path.relative_to(ROOT).as_posix() for package in OWN for path in (ROOT / package).rglob("*.py") if "mlflow" in imported(path)]
    assert users and all(path.startswith("pipelines/registry/") for path in users)
    assert not [path for path in (ROOT / "models").rglob("*.py") if "ray" in imported(path)]


def test_importing_models_and_the_loop_pulls_in_neither_ray_nor_mlflow_and_the_commands_nothing_that_draws() -> None:
    script = (
        "import sys, models.registry, pipelines.training.loop; print(sorted({'ray', 'mlflow', 'optuna', 'faiss'} & set(sys.modules)));"
        "import pipelines.train, pipelines.search, pipelines.encode, tuning.trial; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["[]", "False"]


@pytest.mark.parametrize(("module", "without"), [("console.cli", {"torch", "ray", "mlflow"}), ("serving.shard_deployment", {"torch", "mlflow"})])
def test_the_command_line_sets_the_environment_before_torch_is_loaded_and_a_shard_never_loads_it(module: str, without: set[str]) -> None:
    script = f"import sys, pipelines.{module}; print(sorted({without} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_a_foreign_package_that_shadows_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("")
    script = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import pipelines"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 1
    assert "ImportError" in done.stderr and str(tmp_path / "data") in done.stderr


def test_no_ignore_rule_hides_our_packages() -> None:
    paths = [f"{package}/__init__.py" for package in OWN]
    done = subprocess.run(["git", "check-ignore", *paths], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == ""
