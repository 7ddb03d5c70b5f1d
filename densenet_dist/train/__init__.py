"""Training, evaluating, saving and recording: plain PyTorch, no Ray."""
