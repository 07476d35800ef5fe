"""Shares the tiny checkpoint of the stage tests, under a speaker of this folder's own."""

from tests.stages.conftest import tiny_checkpoint, tiny_speaker  # noqa: F401
