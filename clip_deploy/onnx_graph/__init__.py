"""ONNX graphs: read, written and rewritten."""
