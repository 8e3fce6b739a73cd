"""Rewrites of an ONNX graph for speed: each is checked, and undone where it changes the outputs."""
