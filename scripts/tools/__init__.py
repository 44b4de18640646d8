"""Makers of image folders, baselines, and what a finished run or shipped weights are reported with."""
