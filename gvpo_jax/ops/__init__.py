"""Attention, packing and products, as each kind of hardware computes them best."""
