"""Detections in images and videos: what is looked at, and how results are written."""
