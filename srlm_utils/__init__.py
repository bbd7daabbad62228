"""Helpers behind the notebooks of the Self-Rewarding LM kit. Importing it loads nothing heavy."""

__version__ = "0.1.0"
