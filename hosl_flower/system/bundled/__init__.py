"""The data and the tokenizer that come with the package."""

from pathlib import Path

BUNDLED = Path(__file__).parent
