"""Model definitions in Linen, one file a family, with the tables that load their checkpoints.

Nothing here knows of adapters, and nothing in the transform knows of these models.
"""
