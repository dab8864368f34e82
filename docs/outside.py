"""A hook of mkdocs: links from docs/ to the rest of the repository lead to copies in the site.

The pages are written for a reader of the repository, so they link to ../SECURITY.md or
../strategies/hosl.py. What is linked so, from page to page, is put under repository/ in the site:
Markdown as a page, anything else as it is. Links to a directory lead to its README, or become plain
text where it has none. The search shows guides before other pages.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
# numbers, ranges, units and short words such as "seeds 0, 1"; no sentence
NUMBERS = re.compile(r"<td( [^>]*)?>((?=[^<]*\d)[^<]{1,28})</td>")
NAMES = re.compile(r"<code>([^<\s]{1,32})</code>")
GUIDES = ("how-to/", "tutorials/")  # pages that the search shows before others
STARTS = ("CHANGELOG.md",)  # pages that the navigation has, whether linked or not


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to, and what that links to in turn."""
    found = {_source(page.src_uri) for page in files.documentation_pages()}
    todo = [*found, *map(PurePosixPath, STARTS)]
    while todo:
        source = todo.pop()
        if source not in found:
            found.add(source)
            path = str(ROOT / source)
            files.append(File.generated(config, str(_place(source)), abs_src_path=path))
        if source.suffix == ".md":
            text = (ROOT / source).read_text(encoding="utf-8")
            targets = [_target(source, link[3]) for link in LINK.finditer(text)]
            todo += [t for t in targets if t and t not in found and t.parts[0] != "docs"]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of the repository into links of the site."""
    source = _source(page.file.src_uri)
    if page.file.src_uri.startswith(GUIDES):
        page.meta.setdefault("search", {})["boost"] = 3

    def rewrite(link: re.Match[str]) -> str:
        image, text, address, anchor = link.groups()
        if re.match(r"\w+:", address):
            return link[0]
        target = _target(source, address)
        if target is None:
            return link[0] if not (ROOT / source).parent.joinpath(address).is_dir() else text
        start = PurePosixPath(page.file.src_uri).parent
        return f"{image}[{text}]({os.path.relpath(_place(target), start)}{anchor or ''})"

    return LINK.sub(rewrite, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Keep numbers and short names in code on one line, with site.css."""
    html = NUMBERS.sub(r'<td class="number"\1>\2</td>', html)
    html = NAMES.sub(r'<code class="name">\1</code>', html)
    return re.sub(r"(?<=\d) ([±\u00d7]) (?=\d)", "\u00a0\\1\u00a0", html)


def _target(source: PurePosixPath, address: str) -> PurePosixPath | None:
    """The file of the repository that a page's link means; None where it means none."""
    if re.match(r"\w+:", address):
        return None
    target = PurePosixPath(os.path.normpath(source.parent / address))
    if (ROOT / target).is_dir():
        target /= "README.md"
    return target if (ROOT / target).is_file() else None


def _place(source: PurePosixPath) -> PurePosixPath:
    """Where a file of the repository is in the site."""
    if source.parts[0] != "docs":
        return PurePosixPath("repository", source)
    place = source.relative_to("docs")
    return place.with_suffix(".md") if place.suffix == ".ipynb" else place  # see docs/notebooks.py


def _source(uri: str) -> PurePosixPath:
    """The inverse of `_place`."""
    place = PurePosixPath(uri)
    outside = place.parts[0] == "repository"
    return place.relative_to("repository") if outside else PurePosixPath("docs", place)
