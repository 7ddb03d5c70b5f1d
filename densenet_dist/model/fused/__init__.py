"""The fused dense block: its passes, and the operator that PyTorch sees."""
