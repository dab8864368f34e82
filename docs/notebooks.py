"""Show notebooks as pages of the site, with the outputs they were saved with (a hook of mkdocs).

docs/notebooks/ho_sfl.ipynb becomes the page notebooks/ho_sfl.md. Nothing is executed here.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

COLORS = re.compile(r"\x1b\[[\d;]*m")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page and its pictures for every notebook."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        place = PurePosixPath(file.src_uri)
        pictures: dict[str, bytes] = {}
        cells = json.loads(file.content_string)["cells"]
        parts = [part for cell in cells for part in _cell(cell, place.stem, pictures)]
        parts.insert(1, f'<a href="{place.name}" download>Download the notebook</a>')
        text = "\n\n".join(parts)
        files.append(File.generated(config, str(place.with_suffix(".md")), content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, str(place.parent / name), content=picture))
    return files


def _cell(cell: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """A cell as Markdown, its pictures as files."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        title, _, rest = source.partition("\n\n") if source.startswith("# ") else ("", "", source)
        yield from filter(None, (title, rest))
        return
    yield f"```python\n{source}\n```"
    shown: list[str] = []  # text outputs that follow one another
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" not in data:
            shown += output.get("text", data.get("text/plain", []))
            continue
        yield from _text(shown)
        shown = []
        name = f"{stem}-{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode("".join(data["image/png"]))
        yield f"![Output of the cell above]({name})"
    yield from _text(shown)


def _text(shown: list[str]) -> Iterator[str]:
    """Text outputs as a block without colors, if there are any."""
    if text := COLORS.sub("", "".join(shown)).rstrip():
        yield f"```text\n{text}\n```"
