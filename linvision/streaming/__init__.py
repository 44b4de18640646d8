"""Blocks run chunk by chunk, so that long sequences fit into memory and cache."""
