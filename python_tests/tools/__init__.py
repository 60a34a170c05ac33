"""What reads the CUDA kernels without a GPU: their machine code, its budgets,
and their memory traffic in the emulator.
"""
