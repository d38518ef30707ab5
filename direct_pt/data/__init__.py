"""From files to batches: sources, the annotation table, transforms, the loader."""
