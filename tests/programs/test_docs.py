"""docs/: links lead somewhere, code runs, tables agree with the package, Sphinx has no warning.

A Python block runs, page by page in one namespace, unless a comment `<!-- not run: why -->` stands
before it. Only the last test needs Sphinx.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastcl.functional as F
from fastcl.compat import PATCHABLE
from fastcl.methods import METHODS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?^```(\S*)\n(.*?)^```$", re.M | re.S)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> list[tuple[bool, str]]:
    """(is it run, its text) of a page's code blocks in a language."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(not mark, code) for mark, name, code in found if name == language]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as MyST makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@each_page
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_in_the_table_of_contents():
    (toc,) = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.S)
    named = [line for line in toc.split() if not line.startswith(":") and not line.isdigit()]
    assert sorted([*named, "index"]) == [page.stem for page in PAGES]


@each_page
def test_python_blocks_run(page):
    namespace: dict[str, object] = {"__name__": page.stem}
    for run, code in blocks(page, "python"):
        program = compile(code, str(page), "exec")
        if run:
            exec(program, namespace)


@each_page
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_function_is_in_the_tables_of_losses():
    rows = re.findall(
        r"^\| \{func\}`~fastcl\.functional\.(\w+)`", (DOCS / "losses.md").read_text(), re.M
    )
    assert set(rows) == set(F.__all__)


def test_every_method_is_compared_and_the_recipes_are_those_of_the_code():
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", (DOCS / "methods.md").read_text("utf-8"), re.M)
    assert [name for name, _ in rows] == [*METHODS, *METHODS]
    for name, row in rows[len(METHODS) :]:
        c = METHODS[name].recipes["paper"]
        tau = getattr(c, "temperature", getattr(c, "student_temperature", "–"))
        rate = f"{c.optimizer}, {c.lr:g}"
        expected = (
            *(c.backbone, c.epochs, c.batch_size, rate, c.schedule, f"{c.weight_decay:g}", tau),
        )
        assert [cell.strip() for cell in row.split("|")] == [str(cell) for cell in expected]


def test_what_one_migrates_to_exists_and_all_that_can_be_patched_is_there():
    text = (DOCS / "migrating.md").read_text(encoding="utf-8")
    modules = "|".join([*PATCHABLE, "supcontrast", "official"])
    named = set(re.findall(rf"`({modules})\.(\w+)`", text))
    patched = {(lib, o.partition(":")[2]) for lib, x in PATCHABLE.items() for o in x.objects}
    assert patched <= named
    for library, name in named - patched:
        importlib.import_module(f"fastcl.compat.{library}")
        assert hasattr(sys.modules[f"fastcl.compat.{library}"], name), (library, name)


def test_sphinx_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "furo", "myst_parser"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'fastcl[docs]'")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*build, "-d", tmp_path / "trees", DOCS, tmp_path / "html"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    losses = (tmp_path / "html/losses.html").read_text(encoding="utf-8")
    for name in F.__all__:
        assert f'id="fastcl.functional.{name}"' in losses, name
