"""Networks as files for other programs: ONNX, NIR, and the binary spike-driven form."""
