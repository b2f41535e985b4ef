"""PyTorch on the CPU: for every machine without a GPU that another backend serves."""
