"""What holds for the whole tree: imports go down, files are short, `import lory` is light, configs are explained."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import lory
from lory.config import Section, _find_section, build, dump_yaml, parse_yaml, read_yaml
from lory.generate import GenerationOptions
from lory.training.config import Config, list_bundled

ROOT = Path(__file__).parents[1]
PACKAGE = Path(lory.__file__).parent
HEAVY = ("torch", "transformers", "matplotlib", "pyarrow", "accelerate", "numpy")


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """import-linter, by pyproject.toml's contracts, on the package `lory` inside `tree`."""
    program = f"import sys; sys.path.insert(0, {str(tree)!r}); from importlinter.cli import lint_imports_command; "
    program += f"lint_imports_command(['--no-cache', '--no-logo', '--config', {str(ROOT / 'pyproject.toml')!r}])"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tree, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, to break."""
    shutil.copytree(PACKAGE, tmp_path / "lory", ignore=shutil.ignore_patterns("__pycache__", "*.yaml", "*.jsonl"))
    return tmp_path


def test_imports_go_down_only() -> None:
    result = lint_imports(PACKAGE.parent)
    assert result.returncode == 0, result.stdout
    assert "Contracts: 1 kept, 0 broken." in result.stdout


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("data/packing.py", "lory.models.load"),  # rooms of one floor
        ("losses/cross_entropy.py", "lory.generate"),  # up
        ("export.py", "lory.chat.session"),
        ("runtime.py", "lory.lora.linear"),
        ("parrot.py", "lory.runtime"),  # on no floor at all
    ],
)
def test_a_wrong_import_is_found(copy: Path, module: str, imported: str) -> None:
    with (copy / "lory" / module).open("a") as file:
        file.write(f"\n\ndef squawk():\n    import {imported}\n")
    result = lint_imports(copy)
    assert result.returncode == 1
    assert module.removesuffix(".py").replace("/", ".") in result.stdout


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "examples"])
def test_no_file_is_longer_than_500_lines(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {str(path): lines for path, lines in lengths.items() if lines > 500} == {}


@pytest.mark.parametrize("statement", ["import lory", "import lory.cli", "import lory.config"])
def test_light_imports_bring_nothing_heavy(statement: str) -> None:
    program = f"{statement}; import sys; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A config section and all those in it."""
    yield model
    for field in model.model_fields.values():
        if inner := _find_section(field.annotation):
            yield from sections(inner)


def test_every_config_field_says_what_it_is() -> None:
    everything = [*sections(Config), GenerationOptions]
    assert len(everything) >= 8
    assert [
        f"{section.__name__}.{name}"
        for section in everything
        for name, field in section.model_fields.items()
        if not (field.description or "").strip()
    ] == []
    assert [section.__name__ for section in everything if not issubclass(section, Section)] == []


@pytest.mark.parametrize("name", list_bundled())
def test_a_bundled_config_builds_and_has_a_title(name: str) -> None:
    text = list_bundled()[name]
    assert text.startswith("# ")
    config = build(Config, parse_yaml(text, name), name)
    assert build(Config, parse_yaml(dump_yaml(config), name), name) == config


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_config_builds(path: Path) -> None:
    build(Config, read_yaml(path), str(path))
