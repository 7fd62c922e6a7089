"""How a decoder step is computed: PyTorch, C on a CPU, Triton on a GPU."""
