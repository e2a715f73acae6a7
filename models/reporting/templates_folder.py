"""Where the templates of pages and cards are."""

from pathlib import Path

TEMPLATES = Path(__file__).with_name("templates")
