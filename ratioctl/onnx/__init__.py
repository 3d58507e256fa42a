"""ONNX export and its runtime."""
