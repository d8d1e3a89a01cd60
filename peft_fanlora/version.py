"""The version of the package, which is also stored in the files that it writes."""

__version__ = "0.1.0"
