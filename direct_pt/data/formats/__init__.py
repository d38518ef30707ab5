"""The formats that data sets come in, each read into records."""
