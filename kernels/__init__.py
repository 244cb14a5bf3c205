"""Triton kernels, one file per operation; installed as fastcl.kernels.

A kernel file holds the kernels, and host functions that allocate, choose the grid and launch. It
knows nothing of autograd and of fastcl.ops. The launch configurations are in configs.py.
"""
