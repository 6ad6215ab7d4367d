"""Models of other libraries, adapted as they are and measured: ``python -m examples.gallery``."""
