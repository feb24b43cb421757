"""coterie: find the groups of annotators who agree with each other, and give each group its own reward."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("coterie")
except PackageNotFoundError:  # running from a copied source tree, as in an image layer
    __version__ = "0.0.0+source"
