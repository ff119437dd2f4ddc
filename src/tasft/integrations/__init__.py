"""Plug-ins for other trainers, each of which needs the package that it is for."""
