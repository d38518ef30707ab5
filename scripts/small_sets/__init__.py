"""Parts of experiments.py: declared runs, folds, costs, results, tables."""
