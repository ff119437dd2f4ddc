"""Engines answer prompts: in this process with transformers, or through a server."""

from tasft.engines.base import Engine, Reply, Request, Sampling, collect, replies_in, requests_for
from tasft.engines.local import TransformersEngine
from tasft.engines.server import Server, ServerEngine

__all__ = [
    "Engine",
    "Reply",
    "Request",
    "Sampling",
    "Server",
    "ServerEngine",
    "TransformersEngine",
    "collect",
    "replies_in",
    "requests_for",
]
