"""Reports on data sets and runs: figures, charts, texts."""
