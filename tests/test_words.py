"""The words of the documentation: plain language that addresses the reader.

Pages that are generated, list results or are not rewritten yet are named below.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FENCED = re.compile(r"^```.*?^```", re.M | re.S)
INDENTED = re.compile(r"^(?: {4}|\t).*$", re.M)
TABLE = re.compile(r"^\|.*$", re.M)
INLINE = re.compile(r"`[^`\n]*`")
ADDRESS = re.compile(r"(\]\()[^)]*\)")
WORD = re.compile(r"[A-Za-z][\w'-]*")
FIRST_WORDS = re.compile(r"(What|Who|Where|Whether|Of|How many|As)\b")
BANNED = re.compile(
    r"\b(?:of (?:its|one's|their|your) own(?=\s*(?:[.,:;)]|$))|what (?:comes|came) of|goes on"
    r"|but for|in the place of|so many|is none of|(?<!there )is no(?! (?:better|longer|more)\b)"
    r"|be had|makes of|at home|rooms?|the way|beside)\b",
    re.I,
)

GUIDES = ("README.md", "docs/index.md", "docs/tutorials/", "docs/how-to/")
GENERATED = ("docs/reference/keys.md", "docs/reference/commands.md")
# counted as soon as they are rewritten: take a page off this list and keep it off
PAGES_TO_REWRITE = (
    "README.md", "docs/results.md", "docs/results/", "CHANGELOG.md", "CONTRIBUTING.md",
    "SECURITY.md", "simulations/", "hosl_flower/",
)  # fmt: skip
# packages whose docstrings are not rewritten yet
PACKAGES_TO_REWRITE = (
    "hosl_flower/client", "hosl_flower/compare", "hosl_flower/config", "hosl_flower/data",
    "hosl_flower/export", "hosl_flower/flower", "hosl_flower/gradients", "hosl_flower/ledger",
    "hosl_flower/methods", "hosl_flower/models", "hosl_flower/optim", "hosl_flower/privacy",
    "hosl_flower/protocol", "hosl_flower/report", "hosl_flower/run", "hosl_flower/server",
    "hosl_flower/system", "hosl_flower/tasks", "hosl_flower/tensors", "hosl_flower/zo",
    "strategies",
)  # fmt: skip


def pages(*patterns):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [
        name
        for name in found.stdout.splitlines()
        if (ROOT / name).is_file() and not name.startswith((*GENERATED, *PAGES_TO_REWRITE))
    ]


def prose(text):
    """A page's sentences: without code, tables, addresses and headings."""
    for kind in (FENCED, INDENTED, TABLE):
        text = kind.sub("", text)
    text = re.sub(r"^(#.*|:::.*|<.*)$", "", text, flags=re.M)
    return INLINE.sub("code", ADDRESS.sub(r"\1)", text))


def docstrings(package):
    """Where and what: every docstring of a package."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                line = getattr(node, "lineno", 1)
                yield f"{path.relative_to(ROOT)}:{line}", text


PACKAGES = [
    f"hosl_flower/{path.name}"
    for path in sorted((ROOT / "hosl_flower").iterdir())
    if (path / "__init__.py").is_file()
] + ["strategies"]


DOCUMENTATION = pages("README.md", "docs/*.md")
ALL_PAGES = pages("*.md")


def address(names):
    """How often the pages say you, and their words."""
    words = [word for name in names for word in WORD.findall(prose((ROOT / name).read_text()))]
    return sum(word.lower() in ("you", "your", "yours", "yourself") for word in words), len(words)


@pytest.mark.parametrize("page", [page for page in DOCUMENTATION if page.startswith(GUIDES)])
def test_a_guide_addresses_its_reader(page):
    """At least one you or your in 100 words."""
    you, words = address([page])
    assert you >= words // 100, f"{you} in {words} words"


def test_the_documentation_addresses_its_reader():
    you, words = address(DOCUMENTATION)
    assert you >= words / 100, f"{you} in {words} words"


@pytest.mark.parametrize("page", DOCUMENTATION)
def test_a_page_has_few_semicolons(page):
    text = prose((ROOT / page).read_text(encoding="utf-8"))
    assert text.count(";") <= 0.002 * len(WORD.findall(text)), [
        line for line in text.splitlines() if ";" in line
    ]


@pytest.mark.parametrize("page", ALL_PAGES)
def test_headings_begin_with_words_that_are_searched_for(page):
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    assert not [heading for heading in headings if FIRST_WORDS.match(heading)]


@pytest.mark.parametrize("page", ALL_PAGES)
def test_a_page_has_no_banned_phrase(page):
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    text = ADDRESS.sub(r"\1)", INLINE.sub("code", INDENTED.sub("", text)))
    assert not [found[0] for found in BANNED.finditer(text)]


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_begin_with_what_they_are_or_do(package):
    if package in PACKAGES_TO_REWRITE:
        pytest.skip("not rewritten yet")
    assert not [where for where, text in docstrings(package) if FIRST_WORDS.match(text)]


def test_prose_leaves_code_and_tables_out():
    page = "# You;\n\nIf you `a;b` [see](x;y).\n\n| a; | b |\n\n```bash\nrun; you\n```\n"
    assert prose(page).split() == ["If", "you", "code", "[see]()."]
