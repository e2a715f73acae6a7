"""The names of the layouts. Apart from them, so that a parser of options needs no torch."""

from typing import Literal

LayoutName = Literal["auto", "tree", "rows"]
