"""The theory sheet, made checkable: T1 to T6 on the pencils of a run and on planted ones, and where the model ends."""

from .run import ALPHAS, Settings, verify

__all__ = ["ALPHAS", "Settings", "verify"]
