"""Programs of the system that some tests need."""

import shutil

import pytest

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
