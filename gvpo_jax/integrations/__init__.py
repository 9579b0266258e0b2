"""Doors to other libraries: GVPO's loss where somebody else samples and updates."""
