"""selfsight: self-supervised representation learning for large unlabelled image corpora."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsight.weights import load_pretrained

__all__ = ["__version__", "load_pretrained"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loading weights needs torch and timm; `import selfsight` should not wait for them.
    if name == "load_pretrained":
        return import_module("selfsight.weights").load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
