"""Helpers behind the Super-Resolution Workbook's notebooks; start with ``python -m nbhelpers --help``."""

__version__ = "0.1.0"
