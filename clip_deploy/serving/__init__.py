"""Triton Inference Server: a model repository from a package, a real server to hold it against, and its monitoring."""
