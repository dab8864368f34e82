"""What the pages point to is there: links, anchors, commands, run-config keys, generated pages."""

import importlib.util
import re
import shlex
import subprocess
import tomllib
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from flwr.common.config import parse_config_args

from hosl_flower.cli import cli
from hosl_flower.config.app_config import key_value
from hosl_flower.config.parse import parse_config
from hosl_flower.config.run_config import KEYS
from hosl_flower.methods.load import load_method
from hosl_flower.methods.registry import registered

ROOT = Path(__file__).parents[1]
COMMANDS = set(typer.main.get_command(cli).commands)

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"(?:^ {4}.*\n?)+", re.M)
INLINE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]*)\)")
CALLED = re.compile(r"(?<![\w./-])(?:python -m hosl_flower|hosl-flower) +([a-z][\w-]*)")
KEY_VALUE = re.compile(r"([A-Za-z][\w-]*) *=(?!=)")


def tracked(*patterns):
    """Files of the repository, those about to be added included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [ROOT / line for line in found.stdout.splitlines() if (ROOT / line).is_file()]


PAGES = tracked("*.md")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def prose(text):
    """Without code, in which brackets and # mean something else."""
    return INDENTED.sub("", FENCED.sub("", text))


def code(text):
    """All code of a page, lines that end in a backslash joined."""
    fenced = [body for language, body in FENCED.findall(text) if language != "mermaid"]
    indented = INDENTED.findall(FENCED.sub("", text))
    inline = [span.strip("`") for span in INLINE.findall(prose(text))]
    return [re.sub(r"\s*\\\n\s*", " ", block) for block in [*fenced, *indented, *inline]]


@cache
def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page.read_text()), re.M)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {f"{s}-{slugs[:i].count(s)}".removesuffix("-0") for i, s in enumerate(slugs)}


@by_page
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(prose(page.read_text())):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} is no file"
        assert file.is_relative_to(ROOT), f"{target} leaves the repository"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


@by_page
def test_commands_are_those_of_the_command_line(page):
    for block in code(page.read_text()):
        for command in CALLED.findall(block):
            assert command in COMMANDS, f"hosl-flower {command}"


def run_config_keys(block):
    """Keys set by -c key=value and in --run-config "key=value key=value"."""
    yield from re.findall(r"-c +[\"']?(?!key=value)([\w-]+)=", block)
    for quote, config in re.findall(r"--run-config +([\"'])(.*?)\1", block, re.S):
        inner = "'" if quote == '"' else '"'
        yield from KEY_VALUE.findall(re.sub(f"{inner}.*?{inner}", "", config))


@by_page
def test_run_config_keys_are_in_the_schema(page):
    for block in code(page.read_text()):
        for key in run_config_keys(block):
            assert key in KEYS, f"no run-config key {key} in: {block}"


@by_page
def test_paths_in_code_exist(page):
    rooms = "deploy|docs|hosl_flower|simulations|strategies|tests"
    path = re.compile(rf"(?<![\w./~-])(?:{rooms})/[\w./-]*[\w/](?![\w*<{{])")
    for block in code(page.read_text()):
        for named in path.findall(block):
            assert (ROOT / named).exists(), f"{named} in: {block}"


def shell_commands(page):
    """The command lines of a page, as lists of arguments."""
    for language, block in FENCED.findall(page.read_text()):
        if language == "bash":
            for line in re.sub(r"\\\n", " ", block).splitlines():
                with suppress(ValueError):  # a part of a longer command, an open quote
                    yield shlex.split(line, comments=True)


def app_config(app):
    """The run config of an app that a page names, which may be one that `new` creates."""
    path = ROOT / app / "pyproject.toml"
    path = path if path.is_file() else ROOT / "simulations" / "quickstart" / "pyproject.toml"
    return tomllib.loads(path.read_text())["tool"]["flwr"]["app"]["config"]


@by_page
def test_commands_are_accepted_with_their_values(page):
    for words in shell_commands(page):
        if words[:1] == ["hosl-flower"] and words[1] in COMMANDS:
            typer.main.get_command(cli).commands[words[1]].make_context(words[1], words[2:])
        if words[:1] == ["hosl-flower"] and words[1] in ("run", "simulate", "plan"):
            given = [value for flag, value in pairwise(words) if flag == "-c"]
            changes = dict(map(key_value, given))
        elif words[:2] == ["flwr", "run"] and "--run-config" in words:
            changes = parse_config_args([words[words.index("--run-config") + 1]])
        else:
            continue
        if "data-path" in changes and "target-column" not in changes:
            changes.setdefault("verbalizers", "found,in,it")  # the file is not here
        config = parse_config({**app_config(words[2]), **changes}, " ".join(words))
        if not config.strategy.startswith("my_file:"):
            load_method(config)


@pytest.mark.parametrize("page", tracked("docs/*.md", ":!docs/results"), ids=lambda p: p.stem)
def test_lines_of_code_fit_the_site(page):
    """92 characters fit a window of 1280 pixels (docs/site.css)."""
    for _, block in FENCED.findall(page.read_text()):
        assert max(map(len, block.splitlines()), default=0) <= 92


def test_pages_are_found():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert {"README.md", "index.md", "keys.md"} <= {page.name for page in PAGES}


def test_keys_are_found_in_commands():
    block = """run app -c steps=5 -c "prompt={a} =b" --run-config "task='a b=c' cut-layer = 3" """
    assert list(run_config_keys(block)) == ["steps", "prompt", "task", "cut-layer"]


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["keys", "commands"])
def test_generated_pages_are_current(name):
    generate = module_of(ROOT / "docs" / "generate.py")
    written = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
    assert getattr(generate, f"{name}_page")() == written, "run `python docs/generate.py`"


def test_pictures_are_those_of_the_results():
    frontier = module_of(ROOT / "docs" / "pictures" / "frontier.py")
    committed = ROOT / "docs" / "pictures" / "frontier.svg"
    assert frontier.picture() == committed.read_text(), "run `python docs/pictures/frontier.py`"
    split = (ROOT / "docs" / "pictures" / "split.svg").read_text()
    for method in ("frozen", "ho-sfl", "residual", "recompute", "split-fo"):
        memory = frontier.points()[method][0]
        assert f">{memory:.2f}</text>" in split


def test_the_tutorial_shows_code_of_methods_as_they_are():
    page = (ROOT / "docs" / "tutorials" / "write-a-method.md").read_text()
    blocks = [body for language, body in FENCED.findall(page) if language == "python"]
    sources = [
        (ROOT / "strategies" / f"{n}.py").read_text() for n in ("sign_vote", "frozen_client")
    ]
    assert len(blocks) == 2
    for block, source in zip(blocks, sources, strict=True):
        assert block in source


def test_the_reference_lists_all_methods():
    page = (ROOT / "docs" / "reference" / "methods.md").read_text()
    named = set(re.findall(r"^\| `([\w-]+)` \|", page, re.M)) - {"strategy"}
    assert named == registered().keys()
    files = {entry.module.removeprefix("strategies.") for entry in registered().values()}
    assert files == {path.stem for path in tracked("strategies/*.py")} - {"__init__"}


def test_the_site_has_every_page_it_lists():
    listed = re.findall(r"[:-] (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(listed) > 20
    for name in listed:
        # pages from outside docs/, see docs/outside.py, and notebooks, see docs/notebooks.py
        path = ROOT / "docs" / name
        if name.startswith("repository/"):
            path = ROOT / name.removeprefix("repository/")
        if name.startswith("notebooks/"):
            path = path.with_suffix(".ipynb")
        assert path.is_file(), name


# In Chromium each of these is the first result of the site's search for the words. The search needs
# a browser: here only the condition for it is tested, that a heading of the page has the words.
ANSWERS = {
    "install": "how-to/install.md",
    "getting started": "tutorials/getting-started.md",
    "resume": "how-to/save-checkpoints-and-resume.md",
    "checkpoint": "how-to/save-checkpoints-and-resume.md",
    "custom dataset": "how-to/use-your-own-data.md",
    "own model": "how-to/use-your-own-model.md",
    "deploy": "how-to/deploy.md",
    "gpu": "how-to/use-a-gpu.md",
    "memory": "how-to/reduce-client-memory.md",
    "predict": "how-to/predict.md",
}


@pytest.mark.parametrize(("words", "page"), ANSWERS.items())
def test_the_page_that_answers_has_the_words_of_a_search_in_its_title(words, page):
    title = (ROOT / "docs" / page).read_text().splitlines()[0]
    assert title.startswith("# ")
    assert words in title.lower()
