"""Figures and pictures of data sets and runs, for people."""
