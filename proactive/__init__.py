"""The commands, one module each, and `load_judge` and `load_agent` for notebooks."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proactive.loading import load_agent, load_judge

__all__ = ["load_agent", "load_judge"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the loading functions on first use, because the import takes seconds."""
    if name in __all__:
        from proactive import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _load(package: str) -> None:
    """Import one of the other packages from the folder of this package.

    Python searches the working folder first, which may contain another package `models`.
    """
    spec = PathFinder.find_spec(package, [os.path.dirname(os.path.dirname(__file__))])
    assert spec is not None, package
    assert spec.loader is not None, package
    assert spec.origin is not None, package
    loaded = sys.modules.get(package)
    if loaded is None:
        sys.modules[package] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
    elif os.path.realpath(getattr(loaded, "__file__", None) or "") != os.path.realpath(spec.origin):
        raise ImportError(
            f"proactive needs its own package {package}, but {loaded!r} was imported before by that name; "
            "rename that one, or use it in another process"
        )


for _package in ("datamodules", "models", "callbacks"):
    _load(_package)
