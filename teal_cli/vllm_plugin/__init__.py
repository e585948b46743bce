"""vLLM's way to the thresholds of an exported model: the quantization method `teal`."""
