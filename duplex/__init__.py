"""Duplex Workbench: the kernel that every stage stands on. No stage, no model download."""

__version__ = "0.1.0"
