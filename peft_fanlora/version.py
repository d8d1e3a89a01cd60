"""The version of the package, which the files that it writes carry along."""

__version__ = "0.1.0.dev0"
