"""Conversions between this project's data and others'; `pipeline/convert.py` calls them."""
