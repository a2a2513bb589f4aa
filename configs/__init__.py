"""Presets, each headed by its command, hardware, expected time and result."""
