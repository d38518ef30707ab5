"""The detectors and their parts. `detector.build_detector` is where to start reading."""
