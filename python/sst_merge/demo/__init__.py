"""A small world in which the whole method can be seen at work: `sst-merge demo`."""

from .run import run_demo

__all__ = ["run_demo"]
