"""Images: read as RGB, resized and turned with their boxes and masks, coloured, drawn on."""
