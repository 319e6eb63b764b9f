"""The Triton kernels: forward, backward by role, and how they read and write tensors."""
