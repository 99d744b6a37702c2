"""Tensor operations: plain-PyTorch references and the fast paths tested against them."""
