"""Triton kernels behind the CUDA path; imported on the first CUDA tensor, never before."""
