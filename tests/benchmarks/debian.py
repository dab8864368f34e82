"""Two text tasks that any Debian machine has: what its packages' descriptions are about.

    python tests/benchmarks/debian.py DIRECTORY         writes section.csv and interface.csv

section: the archive's section of a package, of six (Section); interface: whether a program has
windows or a command line (its debtags). The text is the package's one-line description in lower
case, each once. Lists change: the numbers of examples are printed, and belong to a result.
"""

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SECTIONS = {
    "science": "science", "net": "network", "games": "game", "sound": "music",
    "graphics": "picture", "admin": "system",
}  # fmt: skip
INTERFACES = {"interface::x11": "window", "interface::commandline": "command"}


def packages() -> Iterator[dict[str, str]]:
    """Fields of every package that apt knows of."""
    listed = subprocess.run(
        ["apt-cache", "dumpavail"], capture_output=True, text=True, check=True
    ).stdout
    for stanza in listed.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith(" "):
                fields[name] += "" if name == "Description" else line  # its first line is enough
            elif ":" in line:
                name, value = line.split(":", 1)
                fields[name] = value.strip()
        if "Description" in fields:
            yield fields


def main() -> None:
    """Write both files; the first package of a description decides."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, str]] = {"section": {}, "interface": {}}
    for fields in sorted(packages(), key=lambda fields: fields["Package"]):
        text = fields["Description"].lower()
        if label := SECTIONS.get(fields.get("Section", "")):
            rows["section"].setdefault(text, label)
        tags = {tag.strip() for tag in fields.get("Tag", "").split(",")}
        if len(found := [INTERFACES[tag] for tag in INTERFACES if tag in tags]) == 1:
            rows["interface"].setdefault(text, found[0])
    for task, examples in rows.items():
        if not examples:
            raise SystemExit(f"{task}: apt knows of no such package; apt-get update, main archive")
        with (directory / f"{task}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(examples.items())
        labels = list(examples.values())
        print(task, len(labels), {label: labels.count(label) for label in sorted(set(labels))})


if __name__ == "__main__":
    main()
